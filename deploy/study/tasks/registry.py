"""The tasks of studies by name, and the settings with which a run uses a task's models and prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from deploy.study.spec import Settings
from deploy.study.tasks.tiny_translation import make_tiny_translation, tiny_translation_folder
from deploy.study.tasks.tiny_wiki import make_tiny_wiki, tiny_wiki_folder
from distill.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Task:
    """Models and prompts: how to make them, and how a run uses them."""

    settings: Callable[[bool], Settings]
    """The settings of a run on the task. The argument: whether the run tunes, on prompts that no reported
    run sees."""
    make: Callable[[Callable[[str], None]], None]
    """Makes what does not exist yet and reports progress to its argument; raises FetchError."""
    folder: Callable[[], Path]
    """The folder that ``{task}`` stands for in a recipe's settings: ``proxy.model: "{task}/proxy"``."""


def _tiny_task(
    folder: Callable[[], Path],
    make: Callable[[Callable[[str], None]], None],
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
) -> Task:
    """A task with tiny models, of which a whole run fits into one process."""

    def settings(tuning: bool) -> Settings:
        return {
            "teacher.model": str(folder() / "teacher"),
            "student.model": str(folder() / "student"),
            "data.path": str(folder() / ("tuning.jsonl" if tuning else "prompts.jsonl")),
            "data.chat_template": False,
            "data.max_prompt_tokens": max_prompt_tokens,
            "data.on_long_prompt": "skip",
            "data.max_reference_tokens": max_new_tokens,
            "sft.enabled": False,
            "corpus.max_new_tokens": max_new_tokens,
            "rollout.max_new_tokens": max_new_tokens,
            "rollout.engine": "transformers",
            # Not auto, because a study's numbers must not depend on what the processor computes fast.
            "rollout.dtype": "float32",
            "scoring.dtype": "float32",
            "rollout.max_num_seqs": 512,
            "scoring.engine": "transformers",
            "cluster.backend": "in_process",
            "learner.precision": "float32",
            "learner.micro_batch_tokens": 4096,
            "learner.vocabulary_chunk": 512,
        }

    return Task(settings, make, folder)


TASKS: Mapping[str, Task] = {
    "tiny-wiki": _tiny_task(tiny_wiki_folder, make_tiny_wiki, max_prompt_tokens=96, max_new_tokens=64),
    "tiny-translation": _tiny_task(
        tiny_translation_folder, make_tiny_translation, max_prompt_tokens=64, max_new_tokens=48
    ),
}


def identity(folder: Path) -> str:
    """A hash of a task's models and prompts, 16 hexadecimal digits.

    Models differ between machines, because each machine trains its own.
    """
    state = xxhash.xxh3_64()
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.jsonl")]):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # left by a killed process, or being written for another study
        state.update(f"{path.relative_to(folder)}\n".encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def known_task(name: str) -> Task:
    """The task of a name.

    Raises: ConfigError for an unknown name.
    """
    if name not in TASKS:
        raise ConfigError("task", name, f"be one of {', '.join(TASKS)}", did_you_mean(name, TASKS))
    return TASKS[name]
