"""The student as a Hugging Face checkpoint that others use as it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from distill.files import new_folder, write_json
from distill.run.inputs import RunInputs
from learner.model.student import Student


class StudentWriter:
    """Writes a student so that others use it as it was trained: with the run's tokens, template and stop ids.

    The student's first checkpoint may come with another template, or with sampling defaults and stop ids that
    no update has seen.
    """

    def __init__(self, inputs: RunInputs, *, chat_template: bool) -> None:
        """``chat_template``: whether the prompts were formatted with the teacher's template."""
        self._inputs = inputs
        self._chat_template = chat_template

    def write(self, student: Student, folder: Path, facts: Mapping[str, Mapping[str, Any]] = {}) -> None:
        """Write a Hugging Face checkpoint that is never half there.

        ``facts``: JSON files by name that belong to this student, and so replace those of another one with it.
        """
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
            for name, values in facts.items():
                write_json(making / name, values)
