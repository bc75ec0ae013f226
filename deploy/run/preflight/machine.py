"""Checks of the machine: engines, memory, disk and the cluster."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deploy.cluster.address import head_address, probe, require_token_authentication
from deploy.fetch import cache_dir
from deploy.placement import described, place_on_node, pool_violations
from deploy.run.estimates import Estimates
from deploy.run.preflight.outcome import Check
from deploy.run.tracking.kinds import require_installed
from deploy.run.vllm_build import vllm_computes_on_gpu
from distill.config import RunConfig
from distill.errors import ConfigError
from distill.machine.container import available_memory, memory_limit
from distill.machine.hardware import usable_cores
from distill.room import IN_MEMORY
from distill.run.folder import RunFolder
from distill.run.inputs import shared_memory_root


def engines(config: RunConfig) -> Iterator[Check]:
    """Check that the engines are installed and the learner's device is there.

    Raises: ConfigError.
    """
    for section in ("rollout", "scoring"):
        engine = getattr(config, section).engine
        if engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                f"{section}.engine", "vllm", "be installed",
                     "install the cpu or gpu extra, or set engine=transformers"
            )  # fmt: skip
    if not vllm_computes_on_gpu():
        for violation in pool_violations(config, usable_cores()):
            raise violation
    if config.learner.device == "cuda":
        from torch.cuda import is_available

        if not is_available():
            raise ConfigError(
                "learner.device",
                "cuda",
                "be available (torch finds no GPU)",
                "set it to auto, or use a machine with a GPU",
            )
    yield Check(
        "engines",
        "pass",
        f"rollout by {config.rollout.engine}, scoring by {config.scoring.engine}",
    )


def trackers(config: RunConfig) -> Iterator[Check]:
    """Check that the packages of the trackers are installed.

    Raises: ConfigError.
    """
    require_installed(config)
    yield Check("trackers", "pass", ", ".join(config.tracking.to) or "none")


def cache() -> Iterator[Check]:
    """Check that the cache, which keeps the teacher's text, is writable.

    Raises: ConfigError.
    """
    require_writable("DISTILL_CACHE", cache_dir(), "set DISTILL_CACHE to a folder that you can write to")
    yield Check("cache", "pass", f"{cache_dir()} is writable")


def require_writable(name: str, folder: Path, remedy: str) -> Path:
    """Check that ``folder`` can be made, if it is not there, and written to; returns its nearest folder that exists.

    A file is written, because the permissions of the superuser and of read-only file systems say nothing.

    Raises: ConfigError.
    """
    folder = folder.absolute()
    place = next(
        path for path in (folder, *folder.parents) if os.path.exists(path)
    )  # false for what it may not look at
    if not place.is_dir():
        raise ConfigError(name, folder, f"be a folder ({place} is a file)", remedy)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigError(name, folder, f"be writable ({place}: {error.strerror})", remedy) from error
    return place


def buffer(config: RunConfig, estimates: Estimates) -> Iterator[Check]:
    """Check that the rows of the updates in flight fit the replay buffer.

    Raises: ConfigError.
    """
    need = estimates.window()
    if need > config.replay.max_bytes:
        raise ConfigError(
            "replay.max_bytes", config.replay.max_bytes,
                 f"be >= the size of the rows of {config.replay.max_policy_age + 2} updates, {need} bytes",
                 "raise it or use smaller batches, because the learner waits for all rows of an update"
        )  # fmt: skip
    yield Check("buffer", "pass", f"needs {need >> 20} MiB of at most {config.replay.max_bytes >> 20} MiB")


def memory(estimates: Estimates) -> Iterator[Check]:
    """Compare the memory that a run needs with what is available on the machine, and within the container's limit."""
    by_role = estimates.memory() | {"rows and weights": estimates.shared_memory()}
    need, available, limit = sum(by_role.values()), available_memory(), memory_limit()
    parts = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in by_role.items())
    within = (
        f" within the container's limit of {limit.num_bytes / 2**30:.1f} GiB" if limit is not None else ""
    )
    message = f"needs about {need / 2**30:.1f} GiB of {available / 2**30:.1f} GiB available{within} ({parts})"
    if need > available:
        larger = "give the container more memory, " if limit is not None else ""
        yield Check("memory", "warn", message,
                    f"{larger}lower kv_cache_gib or learner.micro_batch_tokens, or set learner.keep_activations=false")  # fmt: skip
    else:
        yield Check("memory", "pass", message)


def disk(config: RunConfig, estimates: Estimates) -> Iterator[Check]:
    """Check that the run folder can be made and that the disk has room, also for what shared memory has no room for.

    Raises: ConfigError.
    """
    run_dir = Path(config.run_dir).absolute()
    place = require_writable("run_dir", run_dir, "choose another run_dir")
    folder = RunFolder(run_dir)
    folder.refuse_foreign_files()
    need = estimates.student_parameters() * _bytes_per_parameter(folder, config.checkpoint.keep)
    shm, wanted = shared_memory_root(), estimates.shared_memory()
    left = shutil.disk_usage(shm).free
    need += max(0, wanted - left)
    free = shutil.disk_usage(place).free
    if free < need:
        raise ConfigError(
            "free disk", f"{free >> 20} MiB", f"be >= {need >> 20} MiB at {place}",
                 "free some there, lower checkpoint.keep, or choose another run_dir"
        )  # fmt: skip
    yield Check("disk", "pass", f"needs {need >> 20} MiB of {free >> 20} MiB free")
    weights = estimates.weights_in_memory()
    message = f"needs {wanted >> 20} MiB at {shm}, {weights >> 20} MiB of it for weights"
    if left < wanted:
        what = "weights and rows go" if left < weights else "some rows go"
        message += f", but {left >> 20} MiB are free, so {what} to the run folder, which is slower"
        yield Check("shared memory", "warn", message, IN_MEMORY)
    else:
        yield Check("shared memory", "pass", message)


def cluster(config: RunConfig) -> Iterator[Check]:
    """Check that the Ray cluster answers, is protected and has what the actors take, or that a local Ray finds ports.

    Raises: ConfigError.
    """
    if config.cluster.backend == "in_process":
        yield Check("cluster", "pass", "not needed, because all actors live in one process")
        return
    address = head_address(config.cluster)
    if address is None:
        _require_loopback()
        yield Check("cluster", "pass", "loopback has free ports for a local Ray")
        if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
            yield Check(
                "cluster",
                "warn",
                "RAY_AUTH_MODE turns Ray's tokens off, and Ray's node service listens on all addresses of this machine",
                "unset it, and Ray makes a token by itself",
            )
        return
    node = probe(address)
    if config.cluster.require_token:
        require_token_authentication(address, node)
    placement = place_on_node(config, usable_cores(), node, vllm_on_gpu=vllm_computes_on_gpu())
    text = (
        f"the actors run on node {node.address} of the Ray cluster at {address.value}: {described(placement)}"
    )
    yield Check("cluster", "pass", text)


def _require_loopback() -> None:
    """Raises: ConfigError when loopback has no free port."""
    try:
        with socket.socket() as probing:
            probing.bind(("127.0.0.1", 0))
    except OSError as error:
        raise ConfigError(
            "loopback",
            "127.0.0.1",
            f"have a free port ({error})",
            "free one, because a local Ray listens on loopback",
        ) from error


def _bytes_per_parameter(folder: RunFolder, keep: int) -> int:
    """Bytes on disk per parameter of the student, of what the run in ``folder`` has still to write.

    A checkpoint contains weights and two moments. A new one is complete before the oldest is deleted. Models are
    the cut, the fine-tuned, the best and the last student; the last two are written anew.
    """
    num_checkpoints = keep + 1 - min(keep, len(folder.steps))
    num_models = 4 - folder.cut.exists() - folder.sft.exists()
    return 12 * num_checkpoints + 4 * num_models
