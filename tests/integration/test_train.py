"""`distill train` with real Ray and real engines on a random tiny Llama.

Each run is a separate process, as when a user starts it. Tests use vLLM where they are about it, and
otherwise the transformers engine, because that starts in a third of the time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil
import pyarrow.parquet as pq
import pytest

from distill.evaluation import load_evaluation
from distill.run.folder import RunFolder
from distill.run.metrics import read_metrics, reproducible
from learner.process.checkpoint import Checkpoints
from tests.tiny import make_world, save_tiny_llama, tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLAIN = ["rollout.engine=transformers", "scoring.engine=transformers"]
"""Settings for engines that start fast."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def start(
    world: Path, *arguments: str, within: Sequence[str] = (), output: IO[str] | int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """``within``: a command that runs the one that follows. ``output``: where what it prints goes."""
    environment = os.environ | {"DISTILL_CACHE": str(world / "cache")}
    return subprocess.Popen(
        [*within, sys.executable, "-m", "deploy.cli.main", *arguments],
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(world: Path, run: str, *overrides: str) -> Path:
    """Train to the end; returns the run folder."""
    process = start(world, *train_arguments(world, run, *overrides))
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-4000:]
    return world / run


def train_arguments(world: Path, run: str, *overrides: str) -> list[str]:
    config = str(world / "tiny.yaml")
    return ["train", config, *tiny_overrides(world), f"run_dir={world}/{run}", *overrides]


def different_metrics(run: Path, other: Path) -> dict[str, list[tuple[object, object]]]:
    """The reproducible metrics that differ between two runs in any bit, with their values."""
    table, reference = (reproducible(read_metrics(folder)) for folder in (run, other))
    assert table.column_names == reference.column_names
    pairs = {name: (table[name].to_pylist(), reference[name].to_pylist()) for name in table.column_names}
    return {name: list(zip(*pair, strict=True)) for name, pair in pairs.items() if pair[0] != pair[1]}


def assert_nothing_shared(run: Path) -> None:
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    assert not Path(f"/dev/shm/distill-{run_id}").exists()


@pytest.fixture(scope="module")
def vllm_run(world: Path) -> Path:
    return train(world, "vllm")


def test_run_folder_is_complete(vllm_run: Path) -> None:
    for name in ("config.yaml", "metrics.parquet", "events.jsonl", "summary.json", "student", "best"):
        assert (vllm_run / name).exists(), name
    summary = json.loads((vllm_run / "summary.json").read_text())
    assert summary["updates"] == 2
    assert summary["policy_version"] >= 3  # one push at the start and one after each update
    assert (summary["recipe"], summary["engine"]) == ("ammd", "vllm")
    for label in ("before", "after"):
        evaluation = summary[label]
        for text in ("teacher_text", "student_text"):
            assert all(evaluation[text][name] > 0 for name in ("tv", "forward_kl", "reverse_kl"))
        assert set(evaluation["rouge_l"]) == {"teacher", "reference"}
        assert evaluation["num_prompts"] == 4
        assert evaluation["stderr"]["teacher_text.tv"] > 0
    assert {"sft", "corpus", "start_engines", "training", "evaluation"} <= set(summary["timing_s"])
    assert {"sft", "corpus", "rollout", "teacher_scored", "learner"} <= set(summary["tokens"])
    assert {"driver", "learner", "replay", "rollout", "teacher", "total"} <= set(summary["peak_pss_bytes"])
    metrics = read_metrics(vllm_run)
    assert metrics["update"].to_pylist() == [1, 2]
    assert metrics["policy/age_max"].to_pylist() == [0, 0]


def test_engine_and_learner_logprobs_agree(vllm_run: Path) -> None:
    """Engine and learner implement the same policy in float32, with the same weights."""
    gaps = read_metrics(vllm_run)["policy/behavior_gap"].to_pylist()
    assert all(abs(gap) <= 1e-4 for gap in gaps), gaps


def test_parity_of_a_run(vllm_run: Path) -> None:
    exact = ["--dtype", "float32", "--learner-dtype", "float32"]
    command = [sys.executable, "-m", "deploy.benchmarks.parity", str(vllm_run), *exact, "--prompts", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    figures = dict(re.findall(r"(mean|largest) ([0-9.e+-]+)", done.stdout.splitlines()[-1]))
    assert 0 < float(figures["mean"]) <= float(figures["largest"]) < 1e-4


def test_checkpoint_is_complete(vllm_run: Path) -> None:
    newest = Checkpoints(vllm_run / "checkpoints", keep=2).latest()
    assert newest is not None and newest.name == "step-2"
    tensors, state = Checkpoints.load(newest)
    assert state["updates_done"] == 2
    assert any(name.startswith("critic.teacher_text") for name in tensors)


def test_student_loads_in_transformers_and_in_vllm(vllm_run: Path) -> None:
    code = f"""
import asyncio, torch
from transformers import AutoModelForCausalLM
from actors.vllm_engine.generator import VllmGenerator
from distill.config import RolloutConfig

async def main():
    model = AutoModelForCausalLM.from_pretrained({str(vllm_run / "student")!r}, dtype=torch.float32)
    prompts = [[0, 5, 6 + i] for i in range(8)]
    with torch.no_grad():
        expected = [model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False)[0, 3:].tolist() for p in prompts]
    engine = await VllmGenerator.start(
        {str(vllm_run / "student")!r}, RolloutConfig(dtype="float32", kv_cache_gib=0.1), max_model_tokens=64, stop_token_ids=[1]
    )
    found = await engine.greedy(prompts, 8)
    await engine.close()
    assert found == expected, (found, expected)

if __name__ == "__main__":
    asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_same_seed_in_lock_step_gives_the_same_numbers(world: Path, vllm_run: Path) -> None:
    again = train(world, "vllm-again")
    assert different_metrics(again, vllm_run) == {}


def test_runs_that_sample_alike_share_corpora(world: Path, vllm_run: Path) -> None:
    """The engine that scores does not matter."""
    del vllm_run

    def corpora() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (world / "cache" / "corpora").iterdir()}

    before = corpora()
    settings = ["scoring.engine=transformers", "recipe.beta=0.5", "learner.num_updates=1"]
    run = train(world, "again", *settings)
    assert corpora() == before
    assert "corpus" not in json.loads((run / "summary.json").read_text())["timing_s"]


def test_backends_give_the_same_numbers(world: Path) -> None:
    settings = [*PLAIN, "recipe=ammd_paper", "learner.num_updates=3"]
    with_ray = train(world, "with-ray", *settings)
    in_process = train(world, "in-process", *settings, "cluster.backend=in_process")
    assert different_metrics(in_process, with_ray) == {}
    evaluations = [load_evaluation(run / "evaluations" / "after.parquet") for run in (in_process, with_ray)]
    assert evaluations[0].table.equals(evaluations[1].table)
    assert_nothing_shared(in_process)


@pytest.mark.parametrize("recipe", ["kd", "gkd", "ammd_paper"])
def test_other_recipes(world: Path, recipe: str) -> None:
    run = train(world, recipe, *PLAIN, f"recipe={recipe}", "learner.num_updates=4")
    metrics = read_metrics(run)
    assert metrics.num_rows == 4
    peaks = json.loads((run / "summary.json").read_text())["peak_pss_bytes"]
    is_student_text = metrics["policy/student_text.num_tokens"].to_pylist()
    if recipe == "kd":
        assert "rollout" not in peaks  # no rollout engine
        assert not any(is_student_text)
    if recipe == "gkd":
        off_policy = metrics["policy/teacher_text.num_tokens"].to_pylist()
        assert all((on == 0) != (off == 0) for on, off in zip(is_student_text, off_policy, strict=True))


def test_share_of_student_text_in_distillm_follows_the_evaluations(world: Path) -> None:
    settings = ["recipe=distillm", "learner.num_updates=9", "recipe.fraction_step=1", "recipe.fraction_tolerance=-100",
                "replay.max_policy_age=1", "replay.samples_per_insert=1", "evaluation.every=2",
                "cluster.backend=in_process"]  # fmt: skip
    run = train(world, "distillm", *PLAIN, *settings)
    with_student = [tokens > 0 for tokens in read_metrics(run)["policy/student_text.num_tokens"].to_pylist()]
    # The evaluation after update 2 raises the share. Text is admitted through update 4 then, or further, because the
    # updates go on while it measures.
    assert not any(with_student[:4])
    assert with_student == sorted(with_student)
    assert "student_share" in events(run)


def test_teacher_that_gives_only_text(world: Path) -> None:
    proxy = save_tiny_llama(world / "proxy", seed=5)
    settings = [*PLAIN, "recipe=ammd_blackbox", f"proxy.model={proxy}", "proxy.num_updates=3",
                "proxy.rows_per_update=4", "learner.num_updates=3"]  # fmt: skip
    run = train(world, "blackbox", *settings)
    summary = json.loads((run / "summary.json").read_text())
    assert {"proxy", "teacher", "sampler"} <= set(
        summary["peak_pss_bytes"]
    )  # the teacher scores for evaluations
    assert all(summary["tokens"][name] > 0 for name in ("teacher_scored", "proxy_scored"))
    assert "proxy_update" in events(run)
    other = train(world, "blackbox-2", *settings, "learner.learning_rate=1e-4", "cluster.backend=in_process")
    assert "proxy_update" not in events(other), "the proxy comes from the cache"
    there = json.loads((other / "summary.json").read_text())
    assert there["proxy_training_s"] == summary["proxy_training_s"] > 0
    metrics = read_metrics(run)
    assert all(gap != 0 for gap in metrics["critic/teacher_text.d_mm"].to_pylist())
    before = load_evaluation(run / "evaluations" / "before.parquet")
    plain = load_evaluation(train(world, "plain-before", *PLAIN, "recipe=fkl") / "evaluations/before.parquet")
    # Evaluations compare with the teacher, not with the proxy.
    assert before.value("teacher_text.tv") == plain.value("teacher_text.tv")


def test_student_with_a_longer_vocabulary(world: Path) -> None:
    """Random weights would sample one of the 62 ids that the teacher lacks in every fifth token."""
    padded = save_tiny_llama(world / "padded", seed=3, vocab_size=320)
    student = [f"student.model={padded}", "student.init.from=null", "student.init.num_layers=null"]
    run = train(world, "padded-run", *PLAIN, *student)
    losses = read_metrics(run)["policy/loss"].to_pylist()
    assert len(losses) == 2
    gaps = read_metrics(run)["policy/behavior_gap"].to_pylist()
    assert max(map(abs, gaps)) < 1e-4  # both normalize over the common vocabulary


def test_several_updates_in_flight(world: Path) -> None:
    run = train(world, "async", "replay.max_policy_age=2", "learner.num_updates=5", "evaluation.every=0")
    ages = read_metrics(run)["policy/age_max"].to_pylist()
    assert max(ages) <= 2
    assert len(ages) == 5


def interrupt(process: subprocess.Popen[str], run: Path, number: int) -> None:
    """Signal a run's driver; check that all its processes end within 10 s and that the user can resume."""
    driver = psutil.Process(process.pid)
    family = [driver, *driver.children(recursive=True)]
    began = time.monotonic()
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=max(0.0, 10 - (time.monotonic() - began)))
    assert not alive, [member.cmdline() for member in alive]
    assert process.returncode == 130
    assert "--resume" in output
    assert_nothing_shared(run)
    assert not (run / "summary.json").exists()


def assert_same_numbers(resumed: Path, whole: Path) -> None:
    """Check that a resumed run differs from an uninterrupted one only in counters."""
    sampled = ("rollout/num_tokens", "rollout/num_samples", "rollout/num_bytes")
    since_the_start = ("policy/version", *sampled, "learner/num_input_tokens")
    different = different_metrics(resumed, whole)
    assert {name for name in different if not name.startswith("replay/")} <= {*since_the_start}, different
    after = [load_evaluation(folder / "evaluations" / "after.parquet") for folder in (resumed, whole)]
    assert after[0].table.equals(after[1].table)


def test_interrupted_run_leaves_nothing_behind_and_resumes_with_the_same_numbers(world: Path) -> None:
    settings = [*PLAIN, "learner.num_updates=9", "checkpoint.every=1", "evaluation.every=0"]
    whole = train(world, "whole", *settings)
    run = world / "cut"
    process = start(world, *train_arguments(world, "cut", *settings))
    wait_for(lambda: len(steps(run)) >= 2, process)
    interrupt(process, run, signal.SIGINT)

    resumed = start(world, "train", "--resume", str(run))
    wait_for(lambda: events(run).count("training_started") == 2, resumed)
    interrupt(resumed, run, signal.SIGTERM)

    resumed = start(world, "train", "--resume", str(run))
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output[-3000:]
    assert_same_numbers(run, whole)


def test_interrupted_corpus_keeps_what_it_has(world: Path) -> None:
    """With vLLM, because its engine is the one that has to let go of a call in progress."""
    settings = ["sft.enabled=false", "corpus.samples_per_prompt=64", "corpus.max_new_tokens=200"]
    settings += ["data.max_prompt_tokens=48", "corpus.seed=5"]
    process = start(world, *train_arguments(world, "corpus-cut", *settings))
    corpora = world / "cache" / "corpora"
    wait_for(lambda: any(corpora.glob("*.parts/*.parquet")), process)
    interrupt(process, world / "corpus-cut", signal.SIGINT)
    kept = {part: part.stat().st_mtime_ns for part in corpora.glob("*.parts/*.parquet")}
    assert kept

    resumed = start(world, "train", "--resume", str(world / "corpus-cut"))

    def rewritten() -> bool:
        return any(part.exists() and part.stat().st_mtime_ns != kept[part] for part in kept)

    wait_for(lambda: rewritten() or "training_started" in events(world / "corpus-cut"), resumed)
    assert not rewritten()
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output[-3000:]
    assert not list(corpora.glob("*.parts"))


def test_a_finished_run_can_be_given_more_updates(world: Path) -> None:
    """With a learning rate that does not depend on their number, it equals a run that had them from the start."""
    constant = [*PLAIN, "learner.warmup_fraction=0", "learner.final_fraction=1"]
    run = train(world, "longer", *constant)
    resumed = start(world, "train", "--resume", str(run), "learner.num_updates=4")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output[-3000:]
    assert json.loads((run / "summary.json").read_text())["updates"] == 4
    at_once = train(world, "at-once", *constant, "learner.num_updates=4")
    assert_same_numbers(run, at_once)


def test_two_runs_at_once_do_not_interfere(world: Path) -> None:
    runs = [start(world, *train_arguments(world, f"pair-{i}", *PLAIN, f"seed={i}")) for i in (1, 2)]
    for process in runs:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output[-3000:]
    for i in (1, 2):
        assert_nothing_shared(world / f"pair-{i}")


def test_dead_engine_without_a_restart_ends_the_run_with_one_line(world: Path) -> None:
    settings = ["learner.num_updates=500", "evaluation.every=0", "checkpoint.every=1000", "cluster.max_restarts=0"]  # fmt: skip
    process = start(world, *train_arguments(world, "dead", *settings))
    wait_for(lambda: "training_started" in events(world / "dead"), process)
    engines = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "EngineCore" in child.name()
    ]
    assert engines
    for engine in engines:
        engine.kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the run failed: " in output.splitlines()[-2]
    assert "Traceback" not in output
    failure = RunFolder(world / "dead").read_failure()
    assert failure is not None and failure["message"] in output.splitlines()[-2]
    assert "rollout engine" in failure["name"] and failure["must"].startswith("live; ")
    assert "ran out of memory" in failure["remedy"]
    assert "EngineDied" in (world / "dead" / "failure.txt").read_text()


def steps(run: Path) -> list[int]:
    return Checkpoints(run / "checkpoints", keep=2).steps() if run.exists() else []


def events(run: Path) -> str:
    path = run / "events.jsonl"
    return path.read_text() if path.exists() else ""


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_metrics_are_readable_parquet(vllm_run: Path) -> None:
    assert pq.read_table(vllm_run / "metrics.parquet").num_rows == 2
