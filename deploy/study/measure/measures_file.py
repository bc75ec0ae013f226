"""The measures of a run's student beyond its evaluations, as :mod:`deploy.study.measure.measure_run` writes them.

Sums and weights per prompt, as an evaluation's are; measures of all texts together beside them.
Reading them loads neither torch nor transformers.
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
"""Of sampling: the points of the frontier."""
READ_AT = (0.85, 0.9, 0.95)
"""Of the student's distribution when it is compared with the teacher's."""
FRONTIER_SCORES = ("rouge_l.teacher", "rouge_l.reference", "bleu.reference", "teacher_logprob")
"""What is drawn against entropy."""
TEXT_MEASURES = ("t1.entropy", "t1.teacher_logprob", "two_sample", "bits_per_byte", "read_at0.9.tv")
"""What is compared between recipes beside the frontiers."""

_OF_ALL = b"distill.of_all"
_TEXTS_KEY = b"distill.teacher_texts"
_CODE = b"distill.measuring_code"


def measures_path(run_dir: Path) -> Path:
    """Where the measures of a run lie."""
    return run_dir / "measures.parquet"


def are_measured(path: Path) -> bool:
    """Whether measures lie there, made by the code of now: what older code found is measured again."""
    if not path.exists():
        return False
    return (pq.read_schema(path).metadata or {}).get(_CODE) == measuring_hash().encode()


def teacher_measures_path(texts_folder: Path, key: str) -> Path:
    """Where those of the teacher lie, measured as a student would be, beside its texts ``key``."""
    return texts_folder / f"{key}-measures.parquet"


@dataclass(frozen=True)
class Measures:
    """Of one run."""

    table: pa.Table

    @classmethod
    def load(cls, path: Path) -> Measures:
        """Raises: FileNotFoundError."""
        return cls(pq.ParquetFile(path).read())

    @property
    def names(self) -> list[str]:
        return [name.removesuffix(".sum") for name in self.table.column_names if name.endswith(".sum")]

    @property
    def of_all(self) -> dict[str, float]:
        """Measures of all texts together."""
        return json.loads((self.table.schema.metadata or {})[_OF_ALL])

    @property
    def texts_key(self) -> str:
        """Of the teacher's texts that these were measured against."""
        return (self.table.schema.metadata or {})[_TEXTS_KEY].decode()

    def values(self) -> dict[str, float]:
        """All of them."""
        return {name: round(self.value(name), 6) for name in (*self.names, *self.of_all)}

    def per_prompt(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(sums, weights) [m]."""
        return self.table[f"{name}.sum"].to_numpy(), self.table[f"{name}.weight"].to_numpy()

    def value(self, name: str) -> float:
        if name in self.of_all:
            return self.of_all[name]
        sums, weights = self.per_prompt(name)
        return float(sums.sum() / weights.sum())


def measures_table(
    columns: Mapping[str, np.ndarray], of_all: Mapping[str, float], texts_key: str
) -> pa.Table:
    """``columns``: ``NAME.sum`` and ``NAME.weight`` [m]."""
    metadata = {
        _OF_ALL: json.dumps(dict(of_all)).encode(),
        _TEXTS_KEY: texts_key.encode(),
        _CODE: measuring_hash().encode(),
    }
    return pa.table(dict(columns)).replace_schema_metadata(metadata)
