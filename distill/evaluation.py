"""Held-out measurement: how far the student is from the teacher, with standard errors.

Needs no model. Whoever has one calls :func:`measure` with the rows and a function that yields
both policies' log-probabilities; what is kept are sums per prompt, so that two evaluations of
the same prompts can be compared pair by pair (:func:`paired_difference`). Reading an
evaluation back loads neither torch nor transformers.

Every metric is a ratio  R = Σ_i S_i / Σ_i n_i  over prompts i: S_i sums the quantity over the
prompt's response tokens (or responses), n_i counts them. So a token counts once whatever the
length of its text. A prompt is one cluster, because its tokens are not independent:

    se(R)² = m/(m−1) Σ_i e_i²,   e_i = (S_i − R n_i) / Σ n,   m prompts          (Taylor linearisation)
    se(R_after − R_before)² = m/(m−1) Σ_i (e_i,after − e_i,before)²              (paired by prompt)

Where a text of every prompt has the same length this is the textbook mean with s/√m.

Shapes: n positions, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.config import EVALUATION_METRICS
from distill.errors import Diverged
from distill.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

METRICS = (*EVALUATION_METRICS, "entropy", "length")
"""Everything that is reported. ``entropy``: of the student on its own text, nats per token;
``length``: tokens per student response."""

EXTRA_METRICS = (
    "teacher_text.tv_early",
    "teacher_text.tv_late",
    "student_text.tv_early",
    "student_text.tv_late",
    "truncated",
)
"""Kept per prompt but not in the summary: TV in the first and last ⌊T/3⌋ tokens of a response
of T tokens (drift), and the share of student responses that the length limit cut."""

_SOURCES: tuple[tuple[Literal["teacher_text", "student_text"], str], ...] = (
    ("teacher_text", "teacher"),
    ("student_text", "student"),
)
_DIVERGENCES = ("tv", "forward_kl", "reverse_kl", "jsd")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BLOCK_NUMBERS = 1 << 19
"""Numbers per block of rows on a CPU: the temporaries of a block stay in its cache."""


def direction(metric: str) -> int:
    """-1 where lower is better, +1 where higher is, 0 where neither (entropy, length)."""
    if metric.startswith("rouge_l"):
        return 1
    return -1 if metric.startswith(("teacher_text.", "student_text.")) else 0


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether ``value`` beats ``best`` strictly. None or NaN as best is beaten by any number."""
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    return direction(metric) * (value - best) > 0


def divergences(policy_logprobs: Tensor, teacher_logprobs: Tensor) -> dict[str, Tensor]:
    """Exact divergences of each position over the whole vocabulary, in float32 nats.

    With π the policy (student) and π* the teacher: ``tv`` = ½ Σ|π* − π|, ``forward_kl`` =
    KL(π* || π), ``reverse_kl`` = KL(π || π*), ``jsd`` = ½ KL(π* || m) + ½ KL(π || m) with m their
    mean, ``entropy`` = −Σ π log π. Both arguments [n, V]
    are normalised log-probabilities; -inf marks a token that cannot occur (a masked tail). A
    KL is +inf where the first policy has mass that the second one excludes.

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
            policy_log, teacher_log = policy_logprobs[block].float(), teacher_logprobs[block].float()
            policy, teacher = policy_log.exp(), teacher_log.exp()
            log_ratio = teacher_log - policy_log
            # 0 · log 0 = 0 by continuity; in floating point it is NaN.
            no_policy, no_teacher = policy == 0, teacher == 0
            found["tv"][block] = (teacher - policy).abs_().sum(-1) / 2
            found["forward_kl"][block] = (teacher * log_ratio).masked_fill_(no_teacher, 0).sum(-1)
            found["reverse_kl"][block] = -(policy * log_ratio).masked_fill_(no_policy, 0).sum(-1)
            found["entropy"][block] = -(policy * policy_log).masked_fill_(no_policy, 0).sum(-1)
            mean_log = ((policy + teacher) / 2).log_()
            from_teacher = (teacher * (teacher_log - mean_log)).masked_fill_(no_teacher, 0).sum(-1)
            from_policy = (policy * (policy_log - mean_log)).masked_fill_(no_policy, 0).sum(-1)
            found["jsd"][block] = (from_teacher + from_policy) / 2
    return found


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(text: str, target: str) -> float:
    """ROUGE-L F1 in [0, 1] by the rouge-score package, without its stemmer.

    The package lowers case and splits at everything but a-z and 0-9, so text in another script
    scores 0. Figures published for instruction data mostly use the stemmer and 0-100.
    """
    return _rouge_scorer().score(target, text)["rougeL"].fmeasure


@dataclass(frozen=True)
class ScoredChunk:
    """Both policies at n positions, of any rows in any order (a slice of a packed batch)."""

    row: Tensor
    """[n] int64: row number, counted over the batches given to ``score``, in their order."""
    step: Tensor
    """[n] int64: response token of the row that is predicted, from 0."""
    policy_logprobs: Tensor
    """[n, V] log-probabilities of the student, nats."""
    teacher_logprobs: Tensor
    """[n, V] log-probabilities of the teacher, nats."""


Score = Callable[[Sequence[pa.RecordBatch]], Iterable[ScoredChunk]]
"""Yields every counted response token of the rows exactly once."""


class Estimate(NamedTuple):
    """A value or a difference, with its standard error over prompts."""

    value: float
    stderr: float
    """NaN where fewer than two prompts were measured."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found: sums and weights of every metric, per prompt."""

    label: str
    table: pa.Table
    """One row per prompt, ascending ``prompt_index``; ``<metric>.sum`` and ``<metric>.weight``
    for all of :data:`METRICS` and :data:`EXTRA_METRICS`. Weight 0: not measured on this prompt."""

    @property
    def prompt_indices(self) -> np.ndarray:
        return self.table["prompt_index"].to_numpy()

    @property
    def num_prompts(self) -> int:
        return self.table.num_rows

    def per_prompt(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(sums, weights) in the order of :attr:`prompt_indices`; their ratio is a prompt's mean."""
        if metric not in METRICS and metric not in EXTRA_METRICS:
            raise KeyError(
                f"{metric} is no metric of an evaluation; they are {', '.join(METRICS + EXTRA_METRICS)}"
            )
        return self.table[f"{metric}.sum"].to_numpy(), self.table[f"{metric}.weight"].to_numpy()

    def estimate(self, metric: str) -> Estimate:
        sums, weights = self.per_prompt(metric)
        seen = weights > 0
        value, residuals = _linearised(sums[seen], weights[seen])
        return Estimate(value, _cluster_stderr(residuals))

    def value(self, metric: str) -> float:
        """The value of a dotted name, e.g. ``teacher_text.tv``; NaN where it was not measured."""
        return self.estimate(metric).value

    def to_dict(self) -> dict[str, Any]:
        """For JSON: nested by the dots of the names; null where nothing was measured."""
        nested: dict[str, Any] = {}
        for name in METRICS:
            part, _, leaf = name.rpartition(".")
            target = nested.setdefault(part, {}) if part else nested
            target[leaf] = _finite(self.value(name))
        nested["num_prompts"] = self.num_prompts
        nested["stderr"] = {name: _finite(self.estimate(name).stderr) for name in METRICS}
        return nested


def paired_difference(before: Evaluation, after: Evaluation) -> dict[str, Estimate]:
    """after − before of each metric, on the prompts that both measured, paired by prompt.

    Most of the variance is between prompts and falls out. A metric that one of them lacks is
    left out. Where ``before`` has more prompts (before training against during), its others
    are not used: the difference is then not that of the two reported values.

    Raises: ValueError when they share fewer than two prompts.
    """
    _, left, right = np.intersect1d(
        before.prompt_indices, after.prompt_indices, assume_unique=True, return_indices=True
    )
    if len(left) < 2:
        raise ValueError(
            f"evaluations {before.label} and {after.label} must share at least two prompts, "
            f"they share {len(left)}; evaluate both on the same held-out prompts"
        )
    differences = {}
    for metric in (*METRICS, *EXTRA_METRICS):
        old_sums, old_weights = (values[left] for values in before.per_prompt(metric))
        new_sums, new_weights = (values[right] for values in after.per_prompt(metric))
        seen = (old_weights > 0) & (new_weights > 0)
        if not seen.any():
            continue
        old, old_residuals = _linearised(old_sums[seen], old_weights[seen])
        new, new_residuals = _linearised(new_sums[seen], new_weights[seen])
        differences[metric] = Estimate(new - old, _cluster_stderr(new_residuals - old_residuals))
    return differences


def _linearised(sums: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The ratio and each prompt's first-order part in its error."""
    if not len(sums):
        return math.nan, np.zeros(0)
    total = weights.sum()
    value = float(sums.sum() / total)
    return value, (sums - value * weights) / total


def _cluster_stderr(residuals: np.ndarray) -> float:
    num_prompts = len(residuals)
    if num_prompts < 2:
        return math.nan
    return math.sqrt(num_prompts / (num_prompts - 1) * float(np.square(residuals).sum()))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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

    Called by the learner. ``teacher_rows``: the teacher's text on these prompts, always the
    same; ``student_rows``: the student's own text, sampled now; both in the trajectory schema.
    ``score`` is called once per source. ``decode``: tokens to text, special tokens left out.
    ``references``: the data set's answer by prompt index; a prompt without one does not count
    in ``rouge_l.reference``. Several texts of one prompt: ROUGE is the mean over all pairs.

    Raises: ValueError when the rows do not fit, or a position was scored twice or never;
    Diverged when a divergence is not finite.
    """
    texts = {
        name: _Text(name, source, rows)
        for (name, source), rows in zip(_SOURCES, (teacher_rows, student_rows), strict=True)
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
        """Add values of the given prompts, each with weight 1."""
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
    """The rows of one source, with a place for what is measured at each response token."""

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
            raise ValueError(f"{self.name}: there is no token {step[wrong]} of row {row[wrong]} to score")
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
                f"was scored {self._times_scored[wrong[0]]} times ({len(wrong)} tokens are wrong)"
            )
        for name, values in self._values.items():
            wrong = np.flatnonzero(self._counted & ~np.isfinite(values))
            if len(wrong):
                row, step = self._where(wrong[0])
                raise Diverged(
                    f"{self.name}: {name} at token {step} of {self.trajectory_ids[row]}",
                    values[wrong[0]],
                    f"be finite ({len(wrong)} tokens are not)",
                    "mask the same tail of both vocabularies",
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
    """The prompts of both texts, ascending; either text may be absent as a whole."""
    prompts = np.union1d(teacher.prompt_index, student.prompt_index)
    for text, other in ((teacher, student), (student, teacher)):
        missing = np.setdiff1d(prompts, text.prompt_index)
        if text.num_rows and len(missing):
            raise ValueError(
                f"{text.name} must answer the prompts of {other.name}, lacks {len(missing)} of {len(prompts)} "
                f"(prompt_index {missing[0]}); evaluate both on the same held-out prompts"
            )
    if not len(prompts):
        raise ValueError("an evaluation must have rows, got neither teacher_rows nor student_rows")
    return prompts


def _reduce_samples(
    teacher: _Text,
    student: _Text,
    decode: Callable[[list[int]], str],
    references: Mapping[int, str],
    sums: _PromptSums,
) -> None:
    """Length and ROUGE-L of the student's responses."""
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


def save_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Write ``<folder>/<label>.parquet``, replacing it whole."""
    if not _LABEL.fullmatch(evaluation.label):
        raise ValueError(
            f"label={evaluation.label!r} must be letters, digits, dots and dashes; it names a file"
        )
    metadata = {"distill.evaluation": "1", "distill.label": evaluation.label}
    sink = pa.BufferOutputStream()
    pq.write_table(evaluation.table.replace_schema_metadata(metadata), sink)
    path = Path(folder) / f"{evaluation.label}.parquet"
    write_bytes(path, sink.getvalue().to_pybytes())
    return path


def load_evaluation(path: Path) -> Evaluation:
    """Raises: FileNotFoundError; ValueError when the file is no evaluation of this version."""
    table = pq.ParquetFile(Path(path)).read()
    metadata = table.schema.metadata or {}
    if metadata.get(b"distill.evaluation") != b"1":
        raise ValueError(
            f"{path} must be an evaluation of version 1, got {metadata.get(b'distill.evaluation')}"
        )
    return Evaluation(metadata[b"distill.label"].decode(), table.replace_schema_metadata(None))
