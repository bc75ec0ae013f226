"""What a finished run's student writes, beyond the run's own evaluations.

    python -m deploy.study.measure_run RUN FOLDER

Quality is a frontier: a sharper student scores higher on ROUGE-L at temperature 1 for free, so the
score is taken at several temperatures beside the entropy there. The rest: the teacher's
log-probability of the student's text, distinct n-grams, a classifier's accuracy in telling the two
apart (two_sample.py), bits per byte of the references, and the distance to the teacher of the
student read at a temperature (which costs nothing and mends an over-dispersed student).

Every number is kept as sums and weights per prompt, as an evaluation's are (distill.evaluation).
Shapes: T response tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import ArrayLike
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.study.measures import READ_AT, TEMPERATURES, measures_path, measures_table
from deploy.study.two_sample import correct_guesses
from distill.config.load import load_config
from distill.data import read_table, write_table
from distill.evaluation import divergences, rouge_l
from distill.run_folder import RunFolder

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

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _model(path: str) -> Any:
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


def measure_run(run_dir: Path, texts_folder: Path) -> None:
    """Writes the run's measures. ``texts_folder``: where the teacher's answers to held-out prompts
    are kept, by teacher, prompts and seed; made when absent, and shared by the runs of a seed.

    Raises: ConfigError when the run is not there.
    """
    folder = RunFolder(run_dir)
    folder.require()
    config = load_config(folder.config)
    models = Models.of(str(config.teacher.model), str(folder.student))
    heldout = read_table(folder.path / "data" / "heldout.parquet").slice(0, config.evaluation.num_prompts)
    prompts = heldout["prompt_tokens"].to_pylist()
    limit = config.corpus.max_new_tokens
    identity = json.dumps([str(config.teacher.model), prompts, limit, config.seed])
    path = texts_folder / f"{xxhash.xxh3_64_hexdigest(identity.encode())}.parquet"
    if not path.exists():
        texts = sample(models.teacher, prompts, temperature=1.0, max_new_tokens=limit, seed=config.seed)
        write_table(pa.table({"response_tokens": texts}), path)
    answers = read_table(path)["response_tokens"].to_pylist()
    sums, of_all = Sums(len(prompts)), {}
    for temperature in TEMPERATURES:
        texts = sample(
            models.student, prompts, temperature=temperature, max_new_tokens=limit, seed=config.seed
        )
        name = f"t{temperature:g}"
        _measure_texts(models, prompts, texts, answers, heldout["reference_text"].to_pylist(),
                       temperature, name, sums)  # fmt: skip
        for length in (1, 2, 3):
            of_all[f"{name}.distinct_{length}"] = distinct(texts, length)
        if temperature == 1.0:
            sums.put("two_sample", correct_guesses(texts, answers).tolist(), [2.0] * len(prompts))
    _measure_read_at(models, prompts, answers, sums)
    _measure_references(models, prompts, heldout["reference_tokens"].to_pylist(), sums)
    write_table(measures_table(sums.columns, of_all), measures_path(Path(run_dir)))


@torch.inference_mode()
def sample(
    model: Any, prompts: Tokens, *, temperature: float, max_new_tokens: int, seed: int
) -> list[list[int]]:
    """One answer a prompt, the stop token included."""
    stop = model.generation_config.eos_token_id
    stops = {stop} if isinstance(stop, int) else set(stop)
    answers: Tokens = []
    torch.manual_seed(seed)
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
    models: Models,
    prompts: Tokens,
    texts: Tokens,
    answers: Tokens,
    references: Sequence[str | None],
    temperature: float,
    name: str,
    sums: Sums,
) -> None:
    entropy, likelihood = np.zeros(len(prompts)), np.zeros(len(prompts))
    for i, student, teacher in position_logits([models.student, models.teacher], prompts, texts):
        policy = (student[:, : models.num_tokens] / temperature).log_softmax(-1)
        entropy[i] = -(policy.exp() * policy).sum()
        given = teacher[:, : models.num_tokens].log_softmax(-1)
        likelihood[i] = given.gather(-1, torch.tensor(texts[i])[:, None]).sum()
    lengths = [len(text) for text in texts]
    sums.put(f"{name}.entropy", entropy, lengths)
    sums.put(f"{name}.teacher_logprob", likelihood, lengths)
    sums.put(f"{name}.length", lengths)
    written = [models.text(text) for text in texts]
    scores = [rouge_l(text, models.text(answer)) for text, answer in zip(written, answers, strict=True)]
    sums.put(f"{name}.rouge_l.teacher", scores)
    known = [float(reference is not None) for reference in references]
    found = [rouge_l(text, reference or "") for text, reference in zip(written, references, strict=True)]
    sums.put(f"{name}.rouge_l.reference", found, known)


def _measure_read_at(models: Models, prompts: Tokens, answers: Tokens, sums: Sums) -> None:
    """The student read at a temperature against the teacher at 1, on the teacher's text."""
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


def _measure_references(
    models: Models, prompts: Tokens, references: Sequence[list[int] | None], sums: Sums
) -> None:
    """Bits per byte of the references' tokens, given the prompt."""
    given = [list(reference or []) for reference in references]
    bits, num_bytes = np.zeros(len(prompts)), np.zeros(len(prompts))
    for i, student in position_logits([models.student], prompts, given):
        logprobs = student.log_softmax(-1)
        bits[i] = -float(logprobs.gather(-1, torch.tensor(given[i], dtype=torch.long)[:, None]).sum())
        num_bytes[i] = len(models.text(given[i]).encode())
    sums.put("bits_per_byte", bits / math.log(2), num_bytes)


def distinct(texts: Tokens, length: int) -> float:
    """Distinct n-grams of all texts over their number (Li et al., 2016)."""
    ngrams = [tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


if __name__ == "__main__":
    measure_run(Path(sys.argv[1]), Path(sys.argv[2]))
