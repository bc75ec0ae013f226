"""The file of a run's measures, which :mod:`deploy.study.measure.measure_run` writes.

It contains sums and weights per prompt, in the form of an evaluation, and the measures that exist only for
all texts together. Reading it loads neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.study.hashes import measuring_hash

TEMPERATURES = (0.5, 0.7, 0.85, 1.0)
"""Sampling temperatures: the points of the frontier."""
READ_AT = (0.85, 0.9, 0.95)
"""Temperatures of the student's distribution when it is compared with the teacher's."""
FRONTIER_SCORES = ("rouge_l.teacher", "rouge_l.reference", "bleu.reference", "teacher_logprob")
"""Scores that frontiers show against entropy."""
TEXT_MEASURES = ("t1.entropy", "t1.teacher_logprob", "two_sample", "bits_per_byte", "read_at0.9.tv")
"""Measures that are compared between recipes in addition to the frontiers."""

_CORPUS_MEASURES = b"distill.corpus_measures"
_TEXTS_KEY = b"distill.teacher_texts"
_CODE = b"distill.measuring_code"


def measures_path(run_dir: Path) -> Path:
    """The file of a run's measures."""
    return run_dir / "measures.parquet"


def are_measured(path: Path) -> bool:
    """Whether the file exists and was written by the present code; other measures are taken again."""
    if not path.exists():
        return False
    return (pq.read_schema(path).metadata or {}).get(_CODE) == measuring_hash().encode()


def teacher_measures_path(texts_folder: Path, key: str) -> Path:
    """The file of a teacher's measures, next to the file of its answers that ``key`` names."""
    return texts_folder / f"{key}-measures.parquet"


@dataclass(frozen=True)
class Measures:
    """The measures of one run's student or teacher."""

    table: pa.Table

    @classmethod
    def load(cls, path: Path) -> Measures:
        """Raises: FileNotFoundError."""
        return cls(pq.ParquetFile(path).read())

    @property
    def names(self) -> list[str]:
        return [name.removesuffix(".sum") for name in self.table.column_names if name.endswith(".sum")]

    @property
    def corpus_measures(self) -> dict[str, float]:
        """The measures of all texts together."""
        return json.loads((self.table.schema.metadata or {})[_CORPUS_MEASURES])

    @property
    def texts_key(self) -> str:
        """Names the teacher's answers that the texts were compared with."""
        return (self.table.schema.metadata or {})[_TEXTS_KEY].decode()

    def values(self) -> dict[str, float]:
        """Every measure by name."""
        return {name: round(self.value(name), 6) for name in (*self.names, *self.corpus_measures)}

    def per_prompt(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(sums, weights) [m]."""
        return self.table[f"{name}.sum"].to_numpy(), self.table[f"{name}.weight"].to_numpy()

    def value(self, name: str) -> float:
        if name in self.corpus_measures:
            return self.corpus_measures[name]
        sums, weights = self.per_prompt(name)
        return float(sums.sum() / weights.sum())


def measures_table(
    columns: Mapping[str, np.ndarray], corpus_measures: Mapping[str, float], texts_key: str
) -> pa.Table:
    """The table of a measures file. ``columns``: ``NAME.sum`` and ``NAME.weight``, each [m]."""
    metadata = {
        _CORPUS_MEASURES: json.dumps(dict(corpus_measures)).encode(),
        _TEXTS_KEY: texts_key.encode(),
        _CODE: measuring_hash().encode(),
    }
    return pa.table(dict(columns)).replace_schema_metadata(metadata)
