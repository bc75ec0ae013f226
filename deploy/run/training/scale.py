"""`distill scale`: another number of actors in a run that goes on.

The command writes a request into the run folder, and the driver answers there. It works wherever the folder is, and
needs no port.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from deploy.placement import pool_violations
from deploy.run.training.crew import Crew
from deploy.run.vllm_build import vllm_computes_on_gpu
from distill.config import RunConfig
from distill.config.tree import with_settings
from distill.errors import NO_VALUE, ConfigError, DistillError
from distill.files import write_json
from distill.interfaces import Role
from distill.machine.hardware import usable_cores
from distill.room import NoSpace
from distill.run.folder import RunFolder

Section = Literal["rollout", "scoring"]
POLL_S = 0.5


class ScaleFailed(DistillError, RuntimeError):
    """A request to scale a run that its driver did not fulfil."""

    code = "scale"


def request_scale(folder: RunFolder, wanted: Mapping[Section, int], timeout_s: float) -> str:
    """Ask the driver of a run for other pools, and wait; returns its answer.

    Raises: ConfigError when the run is not there or does not run, and when the driver refuses; ScaleFailed when an
    actor cannot start, or the driver does not answer in time.
    """
    folder.require()
    if not folder.is_running:
        if folder.summary.exists():
            raise ConfigError("run_dir", folder.path, "be training; it has ended", "start another run")
        must = "be training; no process has the folder"
        raise ConfigError("run_dir", folder.path, must, f"resume it with: {folder.resume_command}")
    name = uuid.uuid4().hex
    write_json(folder.scale_request, {"name": name, "wanted": dict(wanted)})
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        answer = _read(folder.scale_answer)
        if answer is not None and answer["name"] == name:
            if refusal := answer["refusal"]:
                value = NO_VALUE if refusal["value"] is None else refusal["value"]
                raise ConfigError(refusal["name"], value, refusal["must"], refusal["remedy"])
            if failure := answer["failure"]:
                raise ScaleFailed("scale", NO_VALUE, f"be possible; {failure}")
            return answer["text"]
        if not folder.is_running:
            raise ScaleFailed("scale", NO_VALUE, "be answered; the run has ended")
        time.sleep(POLL_S)
    folder.scale_request.unlink(missing_ok=True)
    raise ScaleFailed(
        "scale", NO_VALUE, f"be answered within {timeout_s:g} s", "wait until the run trains, and try again"
    )


async def answer_requests(
    config: RunConfig, folder: RunFolder, crew: Crew, say: Callable[[str], None]
) -> None:
    """Answer the requests in a run folder until cancelled.

    One that is refused changes nothing, and an actor that cannot start is the request's failure and not the run's.
    """
    for stale in (folder.scale_request, folder.scale_answer):
        stale.unlink(missing_ok=True)
    while True:
        await asyncio.sleep(POLL_S)
        request = _read(folder.scale_request)
        if request is None:
            continue
        folder.scale_request.unlink(missing_ok=True)
        refusal = failure = None
        try:
            text = await _scale(config, crew, request["wanted"])
        except ConfigError as error:
            text, refusal = str(error), error.parts()
        except DistillError as error:
            text = failure = str(error)
        answer = {"name": request["name"], "text": text, "refusal": refusal, "failure": failure}
        say(f"scale: {text}")
        with suppress(NoSpace):  # the answer is on the terminal, and the run is worth more
            write_json(folder.scale_answer, answer)


async def _scale(config: RunConfig, crew: Crew, wanted: Mapping[Section, int]) -> str:
    """Resize the pools; returns what changed, in words. Raises: ConfigError, before anything changes."""
    for section, count in wanted.items():
        config = with_settings(config, {f"{section}.replicas": count})
    if config.replay.lock_step:
        raise ConfigError(
            "replay.max_policy_age", 0, "be >= 1 to scale a run: in lock-step, the number of actors decides which "
            "texts are computed together", "start another run with other replicas",
        )  # fmt: skip
    if "rollout" in wanted and not config.recipe.uses_student_text:
        must = "be left out, because the recipe uses no student text"
        raise ConfigError("rollout", wanted["rollout"], must, "scale scoring only")
    on_cpu = () if vllm_computes_on_gpu() else pool_violations(config, usable_cores())
    for violation in [*config.rollout.violations(), *config.scoring.violations(), *on_cpu]:
        raise violation
    roles: dict[Section, Role] = {"rollout": "rollout", "scoring": crew.payload_role}
    for section, count in wanted.items():
        await crew.require_room(roles[section], count, section)
    changes: list[str] = []
    for section, count in wanted.items():
        role = roles[section]
        before = len(crew.pool(role))
        await crew.resize(role, count)
        changes.append(f"{section} {before} -> {len(crew.pool(role))}")
    return ", ".join(changes)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
