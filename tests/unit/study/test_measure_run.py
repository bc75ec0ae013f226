"""Measures of texts against computations on one row at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploy.exits import guarded
from deploy.run.preflight import Preflight
from deploy.run.prepare import prepare
from deploy.study.measure import inference, measure_run
from deploy.study.measure.inference import Models, position_logits, sample
from deploy.study.measure.measure_run import Heldout, Sums, bleu, distinct
from deploy.study.measure.measures_file import Measures, are_measured, measures_path
from distill.config.tree import fingerprint, to_yaml
from distill.data import write_table
from distill.run.folder import RunFolder
from tests.tiny import make_world, save_tiny_llama, tiny_config

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder: Path = tmp_path_factory.mktemp("models")
    for name, seed in (("teacher", 0), ("student", 1)):
        save_tiny_llama(folder / name, seed=seed)
    return Models.of(str(folder / "teacher"), str(folder / "student"))


def heldout(answers: list[list[int]]) -> Heldout:
    return Heldout(PROMPTS, answers, ["a", None, "b"], [[40, 41], None, [42]], 6, seed=0, key="k")


def single_row_logits(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


def test_batched_logits_equal_those_of_single_rows(models, monkeypatch):
    monkeypatch.setattr(inference, "_SCORING_ROWS", 2)
    responses = [[20, 21], [22, 23, 24, 25], [26]]
    found = list(position_logits([models.student, models.teacher], PROMPTS, responses))
    assert [row for row, *_ in found] == [0, 1, 2]
    for row, student, teacher in found:
        for model, logits in ((models.student, student), (models.teacher, teacher)):
            expected = single_row_logits(model, PROMPTS[row], responses[row])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_cold_samples_are_greedy_with_any_padding(models):
    cold = sample(models.student, PROMPTS, temperature=1e-3, max_new_tokens=6, stream="0")
    for prompt, answer in zip(PROMPTS, cold, strict=True):
        assert 1 <= len(answer) <= 6
        assert single_row_logits(models.student, prompt, answer).argmax(-1).tolist() == answer
        assert 1 not in answer[:-1], "nothing follows the stop token"


def test_measures_of_texts_are_sums_over_tokens(models):
    texts, temperature = [[20, 21], [22, 23, 24], [25]], 0.7
    sums = Sums(3)
    measure_run._measure_texts(models, heldout(texts), texts, temperature, "t0.7", sums)
    entropy, likelihood = 0.0, 0.0
    for prompt, text in zip(PROMPTS, texts, strict=True):
        policy = (single_row_logits(models.student, prompt, text) / temperature).softmax(-1)
        entropy -= float((policy * policy.log()).sum())
        given = single_row_logits(models.teacher, prompt, text).log_softmax(-1)
        likelihood += float(sum(given[t, token] for t, token in enumerate(text)))
    assert sums.columns["t0.7.entropy.sum"].sum() == pytest.approx(entropy, rel=1e-4)
    assert sums.columns["t0.7.teacher_logprob.sum"].sum() == pytest.approx(likelihood, rel=1e-4)
    assert sums.columns["t0.7.entropy.weight"].tolist() == [2, 3, 1]
    for score in ("rouge_l", "bleu"):
        assert sums.columns[f"t0.7.{score}.reference.weight"].tolist() == [1, 0, 1]


def test_bits_per_byte_of_the_references(models):
    sums = Sums(3)
    measure_run._measure_references(models, heldout([[], [], []]), sums)
    expected = -sum(
        float(single_row_logits(models.student, prompt, text).log_softmax(-1)[t, token])
        for prompt, text in ((PROMPTS[0], [40, 41]), (PROMPTS[2], [42]))
        for t, token in enumerate(text)
    ) / np.log(2)
    assert sums.columns["bits_per_byte.sum"].sum() == pytest.approx(expected, rel=1e-4)
    assert sums.columns["bits_per_byte.weight"].tolist() == [2, 0, 1]


def test_a_student_with_a_longer_vocabulary_is_cut_to_the_common_one(tmp_path):
    """Otherwise ids that the teacher lacks would take a part of the probability."""
    save_tiny_llama(tmp_path / "teacher")
    save_tiny_llama(tmp_path / "student", seed=1, vocab_size=320)
    padded = Models.of(str(tmp_path / "teacher"), str(tmp_path / "student"))
    sums = Sums(3)
    measure_run._measure_references(padded, heldout([[], [], []]), sums)
    logits = single_row_logits(padded.student, PROMPTS[2], [42])[:, :258]
    bits = -float(logits.log_softmax(-1)[0, 42]) / np.log(2)
    assert sums.columns["bits_per_byte.sum"][2] == pytest.approx(bits, rel=1e-4)


@pytest.fixture(scope="module")
def run_of_a_fetched_teacher(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a run whose teacher is named, not a folder."""
    world = tmp_path_factory.mktemp("world")
    make_world(world)
    (world / "cache/models").mkdir(parents=True)
    (world / "teacher").rename(world / "cache/models/smollm2-135m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_CACHE", str(world / "cache"))
        config = tiny_config(world, "teacher.model=smollm2-135m", "evaluation.num_prompts=2")
        preflight = Preflight(config)
        preflight.run()
        preflight.require()
        with RunFolder(config.run_dir) as folder:
            folder.create(to_yaml(config), fingerprint(config))
            prepare(config, preflight, folder)
        save_tiny_llama(folder.student, seed=1)
        yield folder.path


def measure(*arguments: object) -> int:
    return guarded(measure_run.main, list(map(str, arguments)))


def test_a_fetched_teacher_is_found_by_its_name(run_of_a_fetched_teacher, tmp_path, monkeypatch):
    assert measure(run_of_a_fetched_teacher, tmp_path) == 0
    assert are_measured(measures_path(run_of_a_fetched_teacher))


def test_a_folder_that_cannot_be_written_is_one_line(run_of_a_fetched_teacher, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert measure(run_of_a_fetched_teacher, tmp_path / "file" / "texts") == 1
    assert capsys.readouterr().err.startswith("distill: [Errno ")


def test_distinct_ngrams():
    assert distinct([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct([[1], []], 2) == 0


def test_bleu_of_a_sentence():
    assert bleu("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(1)
    assert bleu("a dog", "the cat sat on the mat") == 0
    # A text of two words has only two orders; exp(1 − 6/2) is the penalty for its length.
    assert bleu("the cat", "the cat sat on the mat") == pytest.approx(np.exp(-2))


def test_the_teacher_in_place_of_the_student_is_the_ceiling(models):
    answers = sample(models.teacher, PROMPTS, temperature=1.0, max_new_tokens=6, stream="0")
    ceiling = Measures(measure_run._measures(models.of_teacher(), heldout(answers)))
    student = Measures(measure_run._measures(models, heldout(answers)))
    assert ceiling.value("read_at1.tv") == pytest.approx(0, abs=1e-6)
    assert student.value("read_at1.tv") > 0.1
    assert ceiling.texts_key == "k"
    assert ceiling.values().keys() == student.values().keys()


def test_a_student_equal_to_the_teacher_writes_different_texts(models, tmp_path):
    """With the same random numbers it would write the same texts, and every score against the teacher's
    would be too good."""
    twin = replace(models, student=models.teacher)
    given = heldout(sample(models.teacher, PROMPTS, temperature=1.0, max_new_tokens=6, stream="teacher 0"))
    found = Measures(measure_run._measures(twin, given))
    assert found.value("t1.rouge_l.teacher") < 0.9
    path = tmp_path / "measures.parquet"
    write_table(found.table, path)
    assert are_measured(path)
    write_table(found.table.replace_schema_metadata({}), path)
    assert not are_measured(path), "measures by other code are taken again"
