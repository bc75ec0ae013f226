"""The processes of an engine end with their owner, and their death fails the calls that wait for them."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from distill.interfaces import EngineDied
from tests.integration.engines import GeneratorHost, make_requests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_no_process_outlives_a_killed_owner(generator: GeneratorHost) -> None:
    started = generator.descendants()
    running = generator.submit("generate", make_requests(16, 900))
    time.sleep(0.2)
    generator.process.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    with pytest.raises(ConnectionError):
        running.result(timeout=10)
    generator.process.join(timeout=10)


@pytest.mark.parametrize("generator", ["vllm"], indirect=True)
def test_pending_calls_fail_when_the_engine_dies(generator: GeneratorHost) -> None:
    """This includes a query, for whose answer vLLM's client would wait for ever."""
    processes = generator.descendants()
    for process in processes:
        process.suspend()
    waiting = [generator.submit("policy_version"), generator.submit("generate", make_requests(2, 8))]
    time.sleep(1.0)
    assert not any(future.done() for future in waiting)
    for process in processes:
        process.kill()
    for future in waiting:
        with pytest.raises(
            EngineDied,
            match=r"^(processes of the )?rollout engine must live; .*; check whether the machine ran out",
        ):
            future.result(timeout=30)
    with pytest.raises(EngineDied):
        generator.call("generate", make_requests(1, 4))
    generator.close()


def test_vllm_workers_settle_vector_math_before_they_load_a_model() -> None:
    """Importing the extension does it: vLLM imports it in every worker before it builds the rotary table."""
    code = (
        "from distill.machine.vector_math import settle_vector_math\n"
        "assert settle_vector_math.cache_info().currsize == 0\n"
        "import actors.vllm_engine.weight_transfer\n"
        "assert settle_vector_math.cache_info().currsize == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
