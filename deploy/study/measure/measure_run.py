"""Measures a finished run's student beyond the run's own evaluations, mostly by the text it writes.

    python -m deploy.study.measure.measure_run RUN FOLDER [--teacher]

Quality is a frontier: a sharper student scores higher on ROUGE-L at temperature 1 for free, so scores are
taken at several temperatures, together with the entropy at each. The other measures are the teacher's
log-probability of the student's text, distinct n-grams, the accuracy of a classifier that distinguishes
student from teacher (two_sample.py), bits per byte of the references, and the distance between the teacher
and the student read at a temperature, which costs nothing and corrects an over-dispersed student. With
``--teacher`` the teacher takes the student's place, which gives the ceiling of every measure.

Measures are stored as sums and weights per prompt, in the form of an evaluation (distill.evaluation).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import ArrayLike
from sacrebleu.metrics.bleu import BLEU

from deploy.exits import DONE, guarded
from deploy.fetch import local_checkpoint
from deploy.study.measure.inference import Models, Tokens, position_logits, sample
from deploy.study.measure.measures_file import (
    READ_AT,
    TEMPERATURES,
    measures_path,
    measures_table,
    teacher_measures_path,
)
from deploy.study.measure.two_sample import correct_guesses
from distill.config import RunConfig
from distill.config.load import load_config
from distill.data import read_table, write_table
from distill.evaluation import divergences, rouge_l
from distill.run.folder import HELDOUT_PROMPTS, RunFolder


class Sums:
    """Sums and weights of named measures, one pair per prompt."""

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts
        self.columns: dict[str, np.ndarray] = {}

    def put(self, name: str, sums: ArrayLike, weights: ArrayLike | None = None) -> None:
        """Set a measure. ``sums`` and ``weights``: [m], one per prompt; without weights each is 1."""
        self.columns[f"{name}.sum"] = np.asarray(sums, np.float64)
        ones = np.ones(self.num_prompts) if weights is None else weights
        self.columns[f"{name}.weight"] = np.asarray(ones, np.float64)


@dataclass(frozen=True)
class Heldout:
    """Held-out prompts of a run, with the teacher's answers to them."""

    prompts: Tokens
    answers: Tokens
    reference_texts: list[str | None]
    reference_tokens: list[list[int] | None]
    max_new_tokens: int
    seed: int
    key: str
    """Names the file of the teacher's answers."""


def measure_run(run_dir: Path, texts_folder: Path, *, of_teacher: bool = False) -> None:
    """Write the measures of a run's student, or of its teacher.

    ``texts_folder``: keeps the teacher's answers to held-out prompts, by teacher, prompts and seed. They
    are sampled when absent; the runs of a seed share them.

    Raises: ConfigError when the run or its teacher does not exist.
    """
    folder = RunFolder(run_dir)
    folder.require()
    config = load_config(folder.config)
    teacher = local_checkpoint(config.teacher.model, config.teacher.revision, "teacher.model")
    models = Models.of(str(teacher), str(folder.student))
    heldout = _heldout(folder, config, models.teacher, texts_folder)
    if of_teacher:
        path = teacher_measures_path(texts_folder, heldout.key)
        write_table(_measures(models.of_teacher(), heldout), path)
    else:
        write_table(_measures(models, heldout), measures_path(run_dir))


def _heldout(folder: RunFolder, config: RunConfig, teacher: Any, texts_folder: Path) -> Heldout:
    table = read_table(folder.data / HELDOUT_PROMPTS).slice(0, config.evaluation.num_prompts)
    prompts, limit = table["prompt_tokens"].to_pylist(), config.corpus.max_new_tokens
    revision = [] if config.teacher.revision is None else [config.teacher.revision]
    identity = json.dumps([str(config.teacher.model), *revision, prompts, limit, config.seed])
    key = xxhash.xxh3_64_hexdigest(identity.encode())
    path = texts_folder / f"{key}.parquet"
    if not path.exists():
        texts = sample(
            teacher, prompts, temperature=1.0, max_new_tokens=limit, stream=f"teacher {config.seed}"
        )
        write_table(pa.table({"response_tokens": texts}), path)
    return Heldout(
        prompts=prompts,
        answers=read_table(path)["response_tokens"].to_pylist(),
        reference_texts=table["reference_text"].to_pylist(),
        reference_tokens=table["reference_tokens"].to_pylist(),
        max_new_tokens=limit,
        seed=config.seed,
        key=key,
    )


def _measures(models: Models, heldout: Heldout) -> pa.Table:
    sums, corpus_measures = Sums(len(heldout.prompts)), {}
    for temperature in TEMPERATURES:
        texts = sample(
            models.student,
            heldout.prompts,
            temperature=temperature,
            max_new_tokens=heldout.max_new_tokens,
            stream=f"student {heldout.seed} {temperature}",
        )
        name = f"t{temperature:g}"
        _measure_texts(models, heldout, texts, temperature, name, sums)
        for length in (1, 2, 3):
            corpus_measures[f"{name}.distinct_{length}"] = distinct(texts, length)
        if temperature == 1.0:
            guesses = correct_guesses(texts, heldout.answers).tolist()
            sums.put("two_sample", guesses, [2.0] * len(guesses))
    _measure_read_at(models, heldout, sums)
    _measure_references(models, heldout, sums)
    return measures_table(sums.columns, corpus_measures, heldout.key)


def _measure_texts(
    models: Models, heldout: Heldout, texts: Tokens, temperature: float, name: str, sums: Sums
) -> None:
    entropy, likelihood = np.zeros(len(texts)), np.zeros(len(texts))
    both = [models.student, models.teacher]
    for i, student, teacher in position_logits(both, heldout.prompts, texts):
        policy = (student[:, : models.num_tokens] / temperature).log_softmax(-1)
        entropy[i] = -(policy.exp() * policy).sum()
        given = teacher[:, : models.num_tokens].log_softmax(-1)
        likelihood[i] = given.gather(-1, torch.tensor(texts[i])[:, None]).sum()
    lengths = [len(text) for text in texts]
    sums.put(f"{name}.entropy", entropy, lengths)
    sums.put(f"{name}.teacher_logprob", likelihood, lengths)
    sums.put(f"{name}.length", lengths)
    written = [models.text(text) for text in texts]
    answers = [models.text(answer) for answer in heldout.answers]
    sums.put(f"{name}.rouge_l.teacher", [rouge_l(*pair) for pair in zip(written, answers, strict=True)])
    known = [float(reference is not None) for reference in heldout.reference_texts]
    pairs = [(text, given or "") for text, given in zip(written, heldout.reference_texts, strict=True)]
    sums.put(f"{name}.rouge_l.reference", [rouge_l(*pair) for pair in pairs], known)
    sums.put(f"{name}.bleu.reference", [bleu(*pair) for pair in pairs], known)


def bleu(text: str, reference: str) -> float:
    """BLEU of one sentence, 0 to 1, by sacrebleu (Post, 2018).

    N-gram orders longer than the texts are left out, and smoothing is exponential. The mean over prompts
    is not a corpus BLEU, but it has an interval.
    """
    return _BLEU.sentence_score(text, [reference]).score / 100


_BLEU = BLEU(effective_order=True)


def _measure_read_at(models: Models, heldout: Heldout, sums: Sums) -> None:
    """Measure the student read at a temperature against the teacher at 1, on the teacher's text."""
    prompts, answers = heldout.prompts, heldout.answers
    found = {(at, kind): np.zeros(len(prompts)) for at in (*READ_AT, 1.0) for kind in ("tv", "forward_kl")}
    for i, student, teacher in position_logits([models.student, models.teacher], prompts, answers):
        target = teacher[:, : models.num_tokens].log_softmax(-1)
        for at in (*READ_AT, 1.0):
            policy = (student[:, : models.num_tokens] / at).log_softmax(-1)
            values = divergences(policy, target)
            for kind in ("tv", "forward_kl"):
                found[at, kind][i] = values[kind].sum()
    lengths = [len(answer) for answer in answers]
    for (at, kind), values in found.items():
        sums.put(f"read_at{at:g}.{kind}", values, lengths)


def _measure_references(models: Models, heldout: Heldout, sums: Sums) -> None:
    """Measure the student's bits per byte of the references, given the prompts."""
    given = [list(reference or []) for reference in heldout.reference_tokens]
    bits, num_bytes = np.zeros(len(given)), np.zeros(len(given))
    for i, student in position_logits([models.student], heldout.prompts, given):
        logprobs = student[:, : models.num_tokens].log_softmax(-1)
        bits[i] = -float(logprobs.gather(-1, torch.tensor(given[i], dtype=torch.long)[:, None]).sum())
        num_bytes[i] = len(models.text(given[i]).encode())
    sums.put("bits_per_byte", bits / math.log(2), num_bytes)


def distinct(texts: Tokens, length: int) -> float:
    """The number of distinct n-grams over that of all n-grams, in all texts (Li et al., 2016)."""
    ngrams = [tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Measure the student of a finished run by the text it writes."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, help="folder for the teacher's answers, which runs share")
    parser.add_argument("--teacher", action="store_true", help="measure the teacher instead of the student")
    options = parser.parse_args(arguments)
    measure_run(options.run, options.folder, of_teacher=options.teacher)
    return DONE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
