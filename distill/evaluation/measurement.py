"""Measuring a student against the teacher: exact divergences at every token, and ROUGE-L of its text.

:func:`measure` needs no model. Its caller supplies the rows and a function that yields both
policies' log-probabilities. torch is loaded by the first call of :func:`divergences`, so that
programs which only read evaluations start without it.

Shapes: n positions, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from distill.errors import Diverged
from distill.evaluation.results import EXTRA_METRICS, METRICS, Evaluation

if TYPE_CHECKING:
    from torch import Tensor

_WRITERS: tuple[tuple[Literal["teacher_text", "student_text"], str], ...] = (
    ("teacher_text", "teacher"),
    ("student_text", "student"),
)
"""The two texts of an evaluation, each with the ``source`` of its rows."""
_DIVERGENCES = ("tv", "forward_kl", "reverse_kl", "jsd")
_BLOCK_NUMBERS = 1 << 19
"""Numbers per block of rows on a CPU: small enough that a block's temporaries stay in the cache."""


def divergences(policy_logprobs: Tensor, teacher_logprobs: Tensor) -> dict[str, Tensor]:
    """Exact divergences at each position over the whole vocabulary, in float32 nats.

    ``tv``, ``forward_kl``, ``reverse_kl``, ``jsd`` (β = ½) and ``entropy`` (of the policy) as
    :mod:`distill.objectives` defines them. Both arguments [n, V] are normalised log-probabilities;
    -inf marks a token that cannot occur (a masked tail) and contributes 0. A KL is +inf where its
    first policy has mass on a token that its second policy excludes.

    Returns: tensors [n], without gradient.
    """
    import torch

    if policy_logprobs.shape != teacher_logprobs.shape:
        raise ValueError(
            f"policy_logprobs {list(policy_logprobs.shape)} must have the shape of teacher_logprobs "
            f"{list(teacher_logprobs.shape)}; cut both to the common prefix of the vocabularies"
        )
    num_positions, vocabulary = policy_logprobs.shape
    names = (*_DIVERGENCES, "entropy")
    found = {name: torch.empty(num_positions, device=policy_logprobs.device) for name in names}
    rows = num_positions if policy_logprobs.is_cuda else max(1, _BLOCK_NUMBERS // vocabulary)
    with torch.no_grad():
        for start in range(0, num_positions, rows or 1):
            block = slice(start, start + rows)
            for name, values in _of_block(policy_logprobs[block], teacher_logprobs[block]).items():
                found[name][block] = values
    return found


def _of_block(policy_logprobs: Tensor, teacher_logprobs: Tensor) -> dict[str, Tensor]:
    from distill import objectives

    policy, teacher = policy_logprobs.float(), teacher_logprobs.float()
    p, q = policy.exp(), teacher.exp()
    # The objectives charge a finite number of nats for excluded mass, so that training can continue.
    # A measurement must report the true value, which is infinite.
    forward_kl = objectives.forward_kl(policy, teacher, teacher_probs=q)
    reverse_kl = objectives.reverse_kl(policy, teacher, policy_probs=p)
    return {
        "tv": objectives.total_variation(policy, teacher, policy_probs=p, teacher_probs=q),
        "forward_kl": forward_kl.masked_fill_(_has_excluded_mass(q, policy), math.inf),
        "reverse_kl": reverse_kl.masked_fill_(_has_excluded_mass(p, teacher), math.inf),
        "jsd": objectives.generalized_jsd(policy, teacher, 0.5, policy_probs=p, teacher_probs=q),
        "entropy": objectives.entropy(policy, policy_probs=p),
    }


def _has_excluded_mass(probs: Tensor, others_logprobs: Tensor) -> Tensor:
    """Per position, whether ``probs`` has mass on a token that the other policy masks."""
    return ((others_logprobs == -math.inf) & (probs > 0)).any(-1)


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(text: str, target: str) -> float:
    """ROUGE-L F1 in [0, 1] by the rouge-score package, without its stemmer.

    The package lowercases its input and splits it at every character except a-z and 0-9, so text
    in another script scores 0. Figures published for instruction data mostly use the stemmer and
    a scale of 0-100.
    """
    return _rouge_scorer().score(target, text)["rougeL"].fmeasure


@dataclass(frozen=True)
class ScoredChunk:
    """Both policies at n positions of any rows, in any order (a slice of a packed batch)."""

    row: Tensor
    """[n] int64: row number, counted through the batches that ``score`` received, in their order."""
    step: Tensor
    """[n] int64: number of the predicted response token within its row, from 0."""
    policy_logprobs: Tensor
    """[n, V] log-probabilities of the student, nats."""
    teacher_logprobs: Tensor
    """[n, V] log-probabilities of the teacher, nats."""


Score = Callable[[Sequence[pa.RecordBatch]], Iterable[ScoredChunk]]
"""Yields every counted response token of the rows exactly once."""


def measure(
    label: str,
    *,
    teacher_rows: Sequence[pa.RecordBatch],
    student_rows: Sequence[pa.RecordBatch],
    score: Score,
    decode: Callable[[list[int]], str],
    references: Mapping[int, str] | None = None,
) -> Evaluation:
    """Measure a student on held-out prompts.

    Called by the learner. ``teacher_rows``: the teacher's text on these prompts, the same in every
    evaluation; ``student_rows``: the student's text, sampled for this one; both in the trajectory
    schema. ``score`` is called once for each of them. ``decode``: tokens to text without special
    tokens. ``references``: the data set's answer by prompt index; a prompt without one does not count
    in ``rouge_l.reference``. If a prompt has several texts, its ROUGE is the mean over all pairs.

    Raises: ValueError when the rows do not match, or when a position was scored twice or never;
    Diverged when a divergence is not finite.
    """
    texts = {
        name: _Text(name, source, rows)
        for (name, source), rows in zip(_WRITERS, (teacher_rows, student_rows), strict=True)
    }
    prompts = _common_prompts(texts["teacher_text"], texts["student_text"])
    sums = _PromptSums(prompts)
    for name, text in texts.items():
        if text.num_rows:
            for chunk in score(text.batches):
                text.add(chunk)
            text.check_complete()
            text.reduce(name, sums)
    _reduce_samples(texts["teacher_text"], texts["student_text"], decode, references or {}, sums)
    return Evaluation(label, sums.table())


class _PromptSums:
    """Sum and weight of every metric, per prompt."""

    def __init__(self, prompts: np.ndarray):
        self._prompts = prompts
        self._sums = {name: np.zeros(len(prompts)) for name in (*METRICS, *EXTRA_METRICS)}
        self._weights = {name: np.zeros(len(prompts)) for name in (*METRICS, *EXTRA_METRICS)}

    def add(self, metric: str, prompt_index: np.ndarray, values: np.ndarray) -> None:
        """Add one value to each of the given prompts, with weight 1."""
        place = np.searchsorted(self._prompts, prompt_index)
        np.add.at(self._sums[metric], place, values)
        np.add.at(self._weights[metric], place, 1.0)

    def table(self) -> pa.Table:
        columns: dict[str, np.ndarray] = {"prompt_index": self._prompts}
        for name in self._sums:
            columns[f"{name}.sum"] = self._sums[name]
            columns[f"{name}.weight"] = self._weights[name]
        return pa.table(columns)


class _Text:
    """The rows of one text, with room for the values measured at each response token."""

    def __init__(self, name: str, source: str, batches: Sequence[pa.RecordBatch]):
        self.name = name
        self.batches = batches
        others = {value for batch in batches for value in batch.column("source").to_pylist()} - {source}
        if others:
            raise ValueError(f"{name} must be rows of source {source}, got {', '.join(sorted(others))}")
        self.trajectory_ids: list[str] = [i for batch in batches for i in batch["trajectory_id"].to_pylist()]
        self.prompt_index = np.array(
            [i for batch in batches for i in batch["prompt_index"].to_pylist()], np.int64
        )
        self.tokens: list[list[int]] = [
            row for batch in batches for row in batch["response_tokens"].to_pylist()
        ]
        self.finish_reasons: list[str | None] = [
            i for batch in batches for i in batch["finish_reason"].to_pylist()
        ]
        masks = [mask for batch in batches for mask in batch["loss_mask"].to_pylist()]
        self.lengths = np.array([len(tokens) for tokens in self.tokens], np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        counted = [
            np.ones(length, bool) if mask is None else np.array(mask, bool)
            for mask, length in zip(masks, self.lengths, strict=True)
        ]
        self._counted = np.concatenate(counted) if counted else np.zeros(0, bool)
        self._times_scored = np.zeros(len(self._counted), np.int64)
        self._values = {name: np.zeros(len(self._counted)) for name in (*_DIVERGENCES, "entropy")}

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    def add(self, chunk: ScoredChunk) -> None:
        row, step = chunk.row.cpu().numpy(), chunk.step.cpu().numpy()
        inside = (row >= 0) & (row < self.num_rows)
        inside &= (step >= 0) & (step < self.lengths[np.where(inside, row, 0)])
        if not inside.all():
            wrong = int(np.flatnonzero(~inside)[0])
            raise ValueError(f"{self.name}: row {row[wrong]} has no token {step[wrong]} to score")
        place = self._starts[row] + step
        np.add.at(self._times_scored, place, 1)
        for name, values in divergences(chunk.policy_logprobs, chunk.teacher_logprobs).items():
            self._values[name][place] = values.cpu().numpy()

    def check_complete(self) -> None:
        wrong = np.flatnonzero(self._counted & (self._times_scored != 1))
        if len(wrong):
            row, step = self._where(wrong[0])
            raise ValueError(
                f"{self.name}: token {step} of {self.trajectory_ids[row]} must be scored once, "
                f"was scored {self._times_scored[wrong[0]]} times ({len(wrong)} such tokens)"
            )
        for name, values in self._values.items():
            wrong = np.flatnonzero(self._counted & ~np.isfinite(values))
            if len(wrong):
                row, step = self._where(wrong[0])
                raise Diverged(
                    f"{self.name}: {name} at token {step} of {self.trajectory_ids[row]}",
                    values[wrong[0]],
                    f"be finite ({len(wrong)} tokens are not)",
                    "lower learner.learning_rate, or sft.learning_rate if this is the evaluation before training",
                )

    def _where(self, place: int) -> tuple[int, int]:
        row = int(np.searchsorted(self._starts, place, side="right")) - 1
        return row, int(place - self._starts[row])

    def reduce(self, name: str, sums: _PromptSums) -> None:
        prompt = np.repeat(self.prompt_index, self.lengths)
        step = np.arange(len(prompt)) - np.repeat(self._starts, self.lengths)
        third = np.repeat(self.lengths // 3, self.lengths)
        early = self._counted & (step < third)
        late = self._counted & (step >= np.repeat(self.lengths, self.lengths) - third)
        for divergence in _DIVERGENCES:
            values = self._values[divergence]
            sums.add(f"{name}.{divergence}", prompt[self._counted], values[self._counted])
        for part, where in (("early", early), ("late", late)):
            sums.add(f"{name}.tv_{part}", prompt[where], self._values["tv"][where])
        if name == "student_text":
            sums.add("entropy", prompt[self._counted], self._values["entropy"][self._counted])


def _common_prompts(teacher: _Text, student: _Text) -> np.ndarray:
    """Return the prompts of both texts, ascending. One of the texts may be absent altogether."""
    prompts = np.union1d(teacher.prompt_index, student.prompt_index)
    for text, other in ((teacher, student), (student, teacher)):
        missing = np.setdiff1d(prompts, text.prompt_index)
        if text.num_rows and len(missing):
            raise ValueError(
                f"{text.name} must answer the prompts of {other.name}, but lacks {len(missing)} of {len(prompts)} "
                f"(prompt_index {missing[0]}); evaluate both on the same held-out prompts"
            )
    if not len(prompts):
        raise ValueError("an evaluation must have rows; pass teacher_rows, student_rows or both")
    return prompts


def _reduce_samples(
    teacher: _Text,
    student: _Text,
    decode: Callable[[list[int]], str],
    references: Mapping[int, str],
    sums: _PromptSums,
) -> None:
    """Add length, truncation and ROUGE-L of the student's responses."""
    sums.add("length", student.prompt_index, student.lengths.astype(float))
    cut = np.array([reason == "length" for reason in student.finish_reasons], float)
    sums.add("truncated", student.prompt_index, cut)
    teacher_texts: dict[int, list[str]] = {}
    for prompt, tokens in zip(teacher.prompt_index.tolist(), teacher.tokens, strict=True):
        teacher_texts.setdefault(prompt, []).append(decode(tokens))
    for prompt, tokens in zip(student.prompt_index.tolist(), student.tokens, strict=True):
        text = decode(tokens)
        targets = {"teacher": teacher_texts.get(prompt, [])}
        targets["reference"] = [references[prompt]] if prompt in references else []
        for name, answers in targets.items():
            for answer in answers:
                sums.add(f"rouge_l.{name}", np.array([prompt]), np.array([rouge_l(text, answer)]))
