"""Tasks of studies: models and prompts by name, and the settings that point a run at them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deploy.study.spec import Settings
from deploy.study.tiny_wiki import make_tiny_wiki, tiny_wiki_folder
from distill.config import ConfigError, rule


@dataclass(frozen=True)
class Task:
    """Where its models and prompts lie, and how they come there."""

    settings: Callable[[bool], Settings]
    """Of a run on it; the argument says whether on the prompts that no reported run sees (tuning)."""
    make: Callable[[Callable[[str], None]], None]
    """Makes what is not there yet, telling how far it is; raises FetchError."""


def _tiny_wiki_settings(tuning: bool) -> Settings:
    folder = tiny_wiki_folder()
    return {
        "teacher.model": str(folder / "teacher"),
        "student.model": str(folder / "student"),
        "data.path": str(folder / ("tuning.jsonl" if tuning else "prompts.jsonl")),
        "data.chat_template": False,
        "data.max_prompt_tokens": 96,
        "data.on_long_prompt": "skip",
        "data.max_reference_tokens": 64,
        "sft.enabled": False,
        "corpus.max_new_tokens": 64,
        "rollout.max_new_tokens": 64,
        "rollout.engine": "transformers",
        "rollout.max_num_seqs": 512,
        "scoring.engine": "transformers",
        "cluster.backend": "in_process",
        "learner.precision": "float32",
        "learner.micro_batch_tokens": 4096,
        "learner.vocabulary_chunk": 4096,
    }


TASKS: Mapping[str, Task] = {"tiny-wiki": Task(_tiny_wiki_settings, make_tiny_wiki)}


def known_task(name: str) -> Task:
    """Raises: ConfigError for an unknown name."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        remedy = f"did you mean {near[0]}?" if near else "choose one of them"
        raise ConfigError(rule("task", name, f"be one of {', '.join(TASKS)}", remedy))
    return TASKS[name]
