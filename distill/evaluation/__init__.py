"""Held-out measurement: how far the student is from the teacher, with standard errors.

:mod:`~distill.evaluation.measurement` compares both policies at every response token.
:mod:`~distill.evaluation.results` keeps what was found, reads it back and compares two
evaluations. Importing this package loads neither torch nor transformers.
"""

from distill.evaluation.measurement import ScoredChunk, divergences, measure, rouge_l
from distill.evaluation.results import (
    EXTRA_METRICS,
    METRICS,
    Estimate,
    Evaluation,
    direction,
    is_better,
    load_evaluation,
    paired_difference,
    save_evaluation,
)

__all__ = [
    "EXTRA_METRICS",
    "METRICS",
    "Estimate",
    "Evaluation",
    "ScoredChunk",
    "direction",
    "divergences",
    "is_better",
    "load_evaluation",
    "measure",
    "paired_difference",
    "rouge_l",
    "save_evaluation",
]
