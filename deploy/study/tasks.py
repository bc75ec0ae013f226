"""Tasks of studies: models and prompts by name, and the settings that point a run at them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from deploy.study.spec import Settings
from deploy.study.tiny_wiki import tiny_wiki
from distill.config import ConfigError, rule


def _tiny_wiki(say: Callable[[str], None], *, tuning: bool) -> Settings:
    folder = tiny_wiki(say)
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


TASKS: Mapping[str, Callable[..., Settings]] = {"tiny-wiki": _tiny_wiki}


def task_settings(name: str, say: Callable[[str], None], *, tuning: bool) -> Settings:
    """Settings of a run on a task; makes what the task needs the first time.

    ``tuning``: prompts that no reported run sees.

    Raises: ConfigError for an unknown name; FetchError.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        remedy = f"did you mean {near[0]}?" if near else "choose one of them"
        raise ConfigError(rule("task", name, f"be one of {', '.join(TASKS)}", remedy))
    return TASKS[name](say, tuning=tuning)
