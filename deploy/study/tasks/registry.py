"""Tasks of studies: models and prompts by name, and the settings that point a run at them."""

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
    """Where its models and prompts lie, and how they come there."""

    settings: Callable[[bool], Settings]
    """Of a run on it; the argument says whether on the prompts that no reported run sees (tuning)."""
    make: Callable[[Callable[[str], None]], None]
    """Makes what is not there yet, telling how far it is; raises FetchError."""
    folder: Callable[[], Path]
    """What ``{task}`` in a recipe's settings stands for, e.g. ``proxy.model: "{task}/proxy"``."""


def _tiny(folder: Callable[[], Path], make: Callable[[Callable[[str], None]], None], **lengths: int) -> Task:
    """A task of tiny models: one process a run. ``lengths``: tokens of prompt and answer."""
    prompt, answer = lengths["max_prompt_tokens"], lengths["max_new_tokens"]

    def settings(tuning: bool) -> Settings:
        return {
            "teacher.model": str(folder() / "teacher"),
            "student.model": str(folder() / "student"),
            "data.path": str(folder() / ("tuning.jsonl" if tuning else "prompts.jsonl")),
            "data.chat_template": False,
            "data.max_prompt_tokens": prompt,
            "data.on_long_prompt": "skip",
            "data.max_reference_tokens": answer,
            "sft.enabled": False,
            "corpus.max_new_tokens": answer,
            "rollout.max_new_tokens": answer,
            "rollout.engine": "transformers",
            # Not auto: a study's numbers shall not hang on what the processor computes fast.
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
    "tiny-wiki": _tiny(tiny_wiki_folder, make_tiny_wiki, max_prompt_tokens=96, max_new_tokens=64),
    "tiny-translation": _tiny(
        tiny_translation_folder, make_tiny_translation, max_prompt_tokens=64, max_new_tokens=48
    ),
}


def identity(folder: Path) -> str:
    """Of a task's models and prompts, 16 hexadecimal digits: they are trained where they are made."""
    state = xxhash.xxh3_64()
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.jsonl")]):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # left by a making that was killed, or under way in another study
        state.update(f"{path.relative_to(folder)}\n".encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def known_task(name: str) -> Task:
    """Raises: ConfigError for an unknown name."""
    if name not in TASKS:
        raise ConfigError("task", name, f"be one of {', '.join(TASKS)}", did_you_mean(name, TASKS))
    return TASKS[name]
