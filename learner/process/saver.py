"""What a run keeps besides its records: checkpoints to resume from, and the best student so far.

Called by :mod:`learner.process.milestones`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer, GenerationConfig

from distill.evaluation import Evaluation, is_better
from distill.files import new_folder
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs
from learner.distiller import Distiller
from learner.model.student import Student
from learner.process.checkpoint import Checkpoints


class CommitTarget(Protocol):
    """The part of the replay service that a checkpoint needs."""

    async def state(self) -> dict[str, Any]: ...

    async def commit(self, updates_done: int) -> None: ...


class Saver:
    """Writes checkpoints and the best student of a run."""

    def __init__(
        self,
        folder: RunFolder,
        checkpoints: Checkpoints,
        distiller: Distiller,
        writer: StudentWriter,
        states: Mapping[str, Callable[[], Any]],
    ) -> None:
        """``states``: what else a checkpoint holds, as JSON, by name."""
        self._folder = folder
        self._checkpoints = checkpoints
        self._distiller = distiller
        self._writer = writer
        self._states = states

    async def save(self, updates_done: int, policy_version: int, replay: CommitTarget) -> None:
        """Write a checkpoint, then make its acknowledgements final.

        The order matters: before the checkpoint is durable, a crash would undo the update.
        """
        state = {
            "updates_done": updates_done,
            "policy_version": policy_version,
            "ledger": await replay.state(),
            **{name: state() for name, state in self._states.items()},
        }
        tensors = self._distiller.tensors()
        await asyncio.to_thread(self._checkpoints.save, updates_done, tensors, state)
        await replay.commit(updates_done)

    async def keep_best(self, updates_done: int, metric: str, evaluation: Evaluation) -> float | None:
        """Keep the student if an evaluation is the best so far; returns the value if it is."""
        best = self._folder.read_best()
        value = evaluation.value(metric)
        comparable = best is not None and best["metric"] == metric
        if not is_better(metric, value, best["value"] if best and comparable else None):
            return None
        await asyncio.to_thread(self._writer.write, self._distiller.student, self._folder.best)
        self._folder.write_best({"update": updates_done, "metric": metric, "value": value})
        return value


class StudentWriter:
    """Writes a student so that others use it as it was trained: with the run's tokens, template and stop ids.

    The student's first checkpoint may come with another template, or with sampling defaults and stop ids that
    no update has seen.
    """

    def __init__(self, inputs: RunInputs, *, chat_template: bool) -> None:
        """``chat_template``: whether the prompts were formatted with the teacher's template."""
        self._inputs = inputs
        self._chat_template = chat_template

    def write(self, student: Student, folder: Path) -> None:
        """Write a Hugging Face checkpoint that is never half there."""
        tokenizer: Any = AutoTokenizer.from_pretrained(self._inputs.teacher_dir, local_files_only=True)
        if not self._chat_template:
            tokenizer.chat_template = None
        generation = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=list(self._inputs.stop_token_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
        with new_folder(folder) as making:
            student.save(making)
            tokenizer.save_pretrained(making)
            generation.save_pretrained(making)
