"""What results hang on: the code of the method, and the code that turns runs into results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import xxhash

import distill

METHOD_CODE = (
    "distill/objectives.py", "distill/credit.py", "distill/algorithm.py", "distill/evaluation.py",
    "distill/config/method.py", "distill/schema.py", "distill/vector_math.py",
    "distill/data/*.py", "distill/replay/*.py", "actors/*.py", "learner/*.py", "deploy/prepare.py",
)  # fmt: skip
"""Whose change makes older runs another method's."""
MEASURING_CODE = tuple(f"deploy/study/{name}.py" for name in ("measure_run", "measures", "two_sample"))
"""Whose change makes the measures of older runs be taken again."""
RESULTS_CODE = (
    *MEASURING_CODE,
    *(f"deploy/study/{name}.py" for name in ("results", "statistics", "differences")),
)
"""Whose change makes older results differently measured; runs stay."""


def method_hash() -> str:
    """Over the source of the method, 16 hexadecimal digits."""
    return _hash(METHOD_CODE)


@functools.cache
def measuring_hash() -> str:
    """Over the source of what measures a run's texts, 16 hexadecimal digits."""
    return _hash(MEASURING_CODE)


def results_hash() -> str:
    """Over the source of what turns runs into results, 16 hexadecimal digits."""
    return _hash(RESULTS_CODE)


def _hash(patterns: Sequence[str], root: Path = Path(distill.__file__).parent.parent) -> str:
    state = xxhash.xxh3_64()
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            state.update(f"{path.relative_to(root)}\n".encode())
            state.update(path.read_bytes())
    return state.hexdigest()
