"""What a finished run's student writes, beyond the run's own evaluations.

    python -m deploy.study.measure.measure_run RUN FOLDER [--teacher]

Quality is a frontier: a sharper student scores higher on ROUGE-L at temperature 1 for free, so the
score is taken at several temperatures beside the entropy there. The rest: the teacher's
log-probability of the student's text, distinct n-grams, a classifier's accuracy in telling the two
apart (two_sample.py), bits per byte of the references, and the distance to the teacher of the
student read at a temperature (which costs nothing and mends an over-dispersed student). With
``--teacher`` the teacher is measured in the student's place: the ceiling.

Every number is kept as sums and weights per prompt, as an evaluation's are (distill.evaluation).
Shapes: T response tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import ArrayLike
from sacrebleu.metrics.bleu import BLEU
from transformers import AutoModelForCausalLM, AutoTokenizer

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
from distill.errors import ConfigError
from distill.evaluation import divergences, rouge_l
from distill.machine.vector_math import settle_vector_math
from distill.run.folder import RunFolder

_BATCH = 256
_SCORING_ROWS = 32

Tokens = list[list[int]]


@dataclass(frozen=True)
class Models:
    """Teacher and student of a run in float32, with their common vocabulary and tokenizer."""

    teacher: Any
    student: Any
    tokenizer: Any
    num_tokens: int

    @classmethod
    def of(cls, teacher: str, student: str) -> Models:
        ours, theirs = (_model(path) for path in (student, teacher))
        num_tokens = min(ours.config.vocab_size, theirs.config.vocab_size)
        return cls(theirs, ours, AutoTokenizer.from_pretrained(teacher), num_tokens)

    def of_teacher(self) -> Models:
        """The teacher in the student's place."""
        return replace(self, student=self.teacher)

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _model(path: str) -> Any:
    settle_vector_math()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


class Sums:
    """Sums and weights of named measures, one of each per prompt."""

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts
        self.columns: dict[str, np.ndarray] = {}

    def put(self, name: str, sums: ArrayLike, weights: ArrayLike | None = None) -> None:
        """``weights``: absent, 1 each."""
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
    """Of the teacher's answers."""


def measure_run(run_dir: Path, texts_folder: Path, *, of_teacher: bool = False) -> None:
    """Writes the run's measures, or those of its teacher. ``texts_folder``: where the teacher's answers
    to held-out prompts are kept, by teacher, prompts and seed; made when absent, and shared by the
    runs of a seed.

    Raises: ConfigError when the run is not there.
    """
    folder = RunFolder(run_dir)
    folder.require()
    config = load_config(folder.config)
    models = Models.of(str(config.teacher.model), str(folder.student))
    heldout = _heldout(folder, config, models.teacher, texts_folder)
    if of_teacher:
        path = teacher_measures_path(texts_folder, heldout.key)
        write_table(_measures(models.of_teacher(), heldout), path)
    else:
        write_table(_measures(models, heldout), measures_path(run_dir))


def _heldout(folder: RunFolder, config: RunConfig, teacher: Any, texts_folder: Path) -> Heldout:
    table = read_table(folder.path / "data" / "heldout.parquet").slice(0, config.evaluation.num_prompts)
    prompts, limit = table["prompt_tokens"].to_pylist(), config.corpus.max_new_tokens
    identity = json.dumps([str(config.teacher.model), prompts, limit, config.seed])
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
    sums, of_all = Sums(len(heldout.prompts)), {}
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
            of_all[f"{name}.distinct_{length}"] = distinct(texts, length)
        if temperature == 1.0:
            guesses = correct_guesses(texts, heldout.answers).tolist()
            sums.put("two_sample", guesses, [2.0] * len(guesses))
    _measure_read_at(models, heldout, sums)
    _measure_references(models, heldout, sums)
    return measures_table(sums.columns, of_all, heldout.key)


@torch.inference_mode()
def sample(
    model: Any, prompts: Tokens, *, temperature: float, max_new_tokens: int, stream: str
) -> list[list[int]]:
    """One answer a prompt, the stop token included.

    ``stream``: names the random numbers. Those of the teacher's answers are no student's: two models that
    draw with the same ones write alike where they are alike, and would look closer than they are.
    """
    stop = model.generation_config.eos_token_id
    stops = {stop} if isinstance(stop, int) else set(stop)
    answers: Tokens = []
    torch.manual_seed(xxhash.xxh3_64_intdigest(stream.encode()) >> 1)
    for first in range(0, len(prompts), _BATCH):
        batch = prompts[first : first + _BATCH]
        width = max(map(len, batch))
        rows = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        made = model.generate(
            rows, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            max_new_tokens=max_new_tokens, pad_token_id=next(iter(stops)),
        )  # fmt: skip
        answers += [_until_stop(row, stops) for row in made[:, width:].tolist()]
    return answers


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return tokens[: end + 1]


@torch.inference_mode()
def position_logits(models: Sequence[Any], prompts: Tokens, responses: Tokens) -> Iterator[tuple[Any, ...]]:
    """(row, logits [T, V] of each model) for every row, at the positions that predict its response."""
    for first in range(0, len(prompts), _SCORING_ROWS):
        rows = range(first, min(first + _SCORING_ROWS, len(prompts)))
        whole = [prompts[i] + responses[i] for i in rows]
        width = max(map(len, whole))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in whole])  # causal: the tail is unseen
        outputs = [model(tokens).logits for model in models]
        for place, i in enumerate(rows):
            start, length = len(prompts[i]) - 1, len(responses[i])
            yield i, *(logits[place, start : start + length].float() for logits in outputs)


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
    """Of one sentence, 0 to 1: sacrebleu's (Post, 2018), orders that neither has left out, exponential
    smoothing. A mean of these over prompts is no corpus BLEU, but has an interval."""
    return _BLEU.sentence_score(text, [reference]).score / 100


_BLEU = BLEU(effective_order=True)


def _measure_read_at(models: Models, heldout: Heldout, sums: Sums) -> None:
    """The student read at a temperature against the teacher at 1, on the teacher's text."""
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
    """Bits per byte of the references' tokens, given the prompt."""
    given = [list(reference or []) for reference in heldout.reference_tokens]
    bits, num_bytes = np.zeros(len(given)), np.zeros(len(given))
    for i, student in position_logits([models.student], heldout.prompts, given):
        logprobs = student.log_softmax(-1)
        bits[i] = -float(logprobs.gather(-1, torch.tensor(given[i], dtype=torch.long)[:, None]).sum())
        num_bytes[i] = len(models.text(given[i]).encode())
    sums.put("bits_per_byte", bits / math.log(2), num_bytes)


def distinct(texts: Tokens, length: int) -> float:
    """Distinct n-grams of all texts over their number (Li et al., 2016)."""
    ngrams = [tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a finished run's student writes.")
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, help="where the teacher's answers are kept")
    parser.add_argument("--teacher", action="store_true", help="measure the teacher instead")
    arguments = parser.parse_args()
    try:
        measure_run(arguments.run, arguments.folder, of_teacher=arguments.teacher)
    except ConfigError as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
