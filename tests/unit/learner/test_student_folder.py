"""The student's folder: usable exactly as the student was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distill.run.folder import RunFolder
from learner.model.student import Student
from learner.process.student_folder import StudentWriter
from tests.tiny import CHAT_TEMPLATE, save_tiny_llama


@pytest.fixture
def written(tmp_path: Path):
    """A function that writes a student whose own checkpoint has other text settings than the teacher's."""
    teacher = save_tiny_llama(tmp_path / "teacher")
    start = save_tiny_llama(tmp_path / "start", seed=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = "{{ messages[0]['content'] }} ->"
    tokenizer.save_pretrained(start)
    GenerationConfig(eos_token_id=7, temperature=0.6, do_sample=True).save_pretrained(start)
    inputs: Any = SimpleNamespace(teacher_dir=str(teacher), stop_token_ids=(1, 3))

    def write(*, chat_template: bool, name: str = "student", **facts: Mapping[str, Any]) -> Path:
        writer = StudentWriter(inputs, chat_template=chat_template)
        student = Student(start, precision="float32", device="cpu")
        writer.write(student, tmp_path / name, {f"{fact}.json": values for fact, values in facts.items()})
        return tmp_path / name

    return write


def test_template_and_stop_ids_are_those_of_training(written) -> None:
    folder = written(chat_template=True)
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [1, 3]
    assert not model.generation_config.do_sample, "the run sampled at temperature 1 and knew no other"
    with torch.no_grad():
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)


def test_student_trained_without_a_template_has_none(written) -> None:
    written(chat_template=True)
    assert AutoTokenizer.from_pretrained(written(chat_template=False)).chat_template is None


def test_the_numbers_of_a_student_are_replaced_with_it(written, tmp_path, monkeypatch) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_best() is None
    written(chat_template=True, name="best", best={"update": 20, "metric": "kl", "value": 0.25})
    assert folder.read_best() == {"update": 20, "metric": "kl", "value": 0.25}
    monkeypatch.setattr("distill.files.sync", disk_full)
    with pytest.raises(OSError, match="free space"):
        written(chat_template=True, name="best", best={"update": 40, "metric": "kl", "value": 0.24})
    assert folder.read_best() == {"update": 20, "metric": "kl", "value": 0.25}
    monkeypatch.undo()
    written(chat_template=True, name="best")
    assert folder.read_best() is None, "the numbers of the student before"


def disk_full(path: Path) -> None:
    raise OSError(28, "the disk is full")
