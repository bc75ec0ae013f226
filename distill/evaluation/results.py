"""The result of a held-out measurement: estimates with standard errors, and paired comparisons.

An evaluation consists of sums per prompt, so that two evaluations of the same prompts can be compared
pair by pair (:func:`paired_difference`). Nothing here needs a model or torch.

Every metric is a ratio  R = Σ_i S_i / Σ_i n_i  over prompts i: S_i sums the quantity over the
prompt's response tokens (or responses), n_i counts them. Every token therefore has the same weight,
whatever the length of its text. A prompt is one cluster, because its tokens are not independent:

    se(R)² = m/(m−1) Σ_i e_i²,   e_i = (S_i − R n_i) / Σ n,   m prompts          (Taylor linearisation)
    se(R_after − R_before)² = m/(m−1) Σ_i (e_i,after − e_i,before)²              (paired by prompt)

Where the texts of all prompts have the same length, this is the textbook mean with s/√m.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.config import EVALUATION_METRICS
from distill.errors import ConfigError, first_line
from distill.files import write_bytes

METRICS = (*EVALUATION_METRICS, "entropy", "length")
"""The metrics of the summary. ``entropy``: of the student on its own text, nats per token;
``length``: tokens per student response."""

EXTRA_METRICS = (
    "teacher_text.tv_early",
    "teacher_text.tv_late",
    "student_text.tv_early",
    "student_text.tv_late",
    "truncated",
)
"""Metrics kept per prompt but left out of the summary: TV in the first and last ⌊T/3⌋ tokens of a
response of T tokens (drift), and the share of student responses that the length limit cut."""

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def direction(metric: str) -> int:
    """Return -1 where lower is better, +1 where higher is, and 0 where neither is (entropy, length)."""
    if metric.startswith("rouge_l"):
        return 1
    return -1 if metric.startswith(("teacher_text.", "student_text.")) else 0


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether ``value`` is strictly better than ``best``. Any number is better than None or NaN."""
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    return direction(metric) * (value - best) > 0


class Estimate(NamedTuple):
    """A value or a difference, with its standard error over prompts."""

    value: float
    stderr: float
    """NaN where fewer than two prompts were measured."""


@dataclass(frozen=True)
class Evaluation:
    """Sums and weights of every metric, per prompt."""

    label: str
    table: pa.Table
    """One row per prompt by ascending ``prompt_index``, with ``<metric>.sum`` and ``<metric>.weight``
    for all of :data:`METRICS` and :data:`EXTRA_METRICS`. Weight 0 means that the metric was not
    measured on this prompt."""

    @property
    def prompt_indices(self) -> np.ndarray:
        return self.table["prompt_index"].to_numpy()

    @property
    def num_prompts(self) -> int:
        return self.table.num_rows

    def per_prompt(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (sums, weights) in the order of :attr:`prompt_indices`; their ratio is a prompt's mean."""
        if metric not in METRICS and metric not in EXTRA_METRICS:
            raise KeyError(
                f"{metric} is no metric of an evaluation; choose one of {', '.join(METRICS + EXTRA_METRICS)}"
            )
        return self.table[f"{metric}.sum"].to_numpy(), self.table[f"{metric}.weight"].to_numpy()

    def estimate(self, metric: str) -> Estimate:
        sums, weights = self.per_prompt(metric)
        seen = weights > 0
        value, residuals = _linearised(sums[seen], weights[seen])
        return Estimate(value, _cluster_stderr(residuals))

    def value(self, metric: str) -> float:
        """The value of a metric such as ``teacher_text.tv``; NaN if it was not measured."""
        return self.estimate(metric).value

    def to_dict(self) -> dict[str, Any]:
        """The summary for JSON, nested by the dots of the names; null where nothing was measured."""
        nested: dict[str, Any] = {}
        for name in METRICS:
            part, _, leaf = name.rpartition(".")
            target = nested.setdefault(part, {}) if part else nested
            target[leaf] = _finite(self.value(name))
        nested["num_prompts"] = self.num_prompts
        nested["stderr"] = {name: _finite(self.estimate(name).stderr) for name in METRICS}
        return nested


def paired_difference(before: Evaluation, after: Evaluation) -> dict[str, Estimate]:
    """Estimate after − before of each metric, paired by prompt, on the prompts that both measured.

    Most of the variance is between prompts, and pairing removes it. A metric that either evaluation
    lacks is left out. Prompts that only one evaluation has are ignored (before training more prompts
    are measured than during it), so the difference can deviate from that of the two reported values.

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
    """Return the ratio R and the residuals e_i: each prompt's first-order contribution to its error."""
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


def save_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Write ``<folder>/<label>.parquet``, replacing it atomically, and return its path.

    Raises: ValueError when the label cannot be a file name.
    """
    if not _LABEL.fullmatch(evaluation.label):
        raise ValueError(
            f"label={evaluation.label!r} must consist of letters, digits, dots, dashes and underscores and start "
            "with a letter or digit, because it names a file"
        )
    metadata = {"distill.evaluation": "1", "distill.label": evaluation.label}
    sink = pa.BufferOutputStream()
    pq.write_table(evaluation.table.replace_schema_metadata(metadata), sink)
    path = Path(folder) / f"{evaluation.label}.parquet"
    write_bytes(path, sink.getvalue().to_pybytes())
    return path


def load_evaluation(path: Path) -> Evaluation:
    """Read what :func:`save_evaluation` wrote.

    Raises: FileNotFoundError; ConfigError when the file is damaged, or is not an evaluation of this version.
    """
    remedy = "bring it back from a copy, or evaluate again with the present version"
    try:
        table = pq.ParquetFile(Path(path)).read()
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise ConfigError("evaluation", path, f"be a Parquet file ({first_line(error)})", remedy) from None
    metadata = table.schema.metadata or {}
    if metadata.get(b"distill.evaluation") != b"1" or b"distill.label" not in metadata:
        found = metadata.get(b"distill.evaluation", b"none").decode(errors="replace")
        raise ConfigError("evaluation", path, f"be an evaluation of version 1, got {found}", remedy)
    return Evaluation(
        metadata[b"distill.label"].decode(errors="replace"), table.replace_schema_metadata(None)
    )
