"""The check that the student is trained towards the distribution that the teacher's engine samples from.

The learner computes the teacher's probabilities from hidden states and a head that it reads itself. Tied
heads, soft-caps, scales and adapters can make these differ from the engine's, and then everything trains
without an error towards a wrong target. The teacher's corpus holds the engine's own log-probability of every
sampled token, which is enough for an estimate of the total variation. Called by
:mod:`learner.process.worker`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from distill.data import read_table
from distill.errors import ConfigError
from distill.schema import hidden_rows
from learner.model.head import Head

CHUNK = 128
"""Positions whose logits exist at the same time."""
TV_LIMIT = 0.05
"""Largest total variation that rounding explains: bfloat16 gives about 0.02."""


def check_teacher(rows: Sequence[pa.RecordBatch], corpus: str, head: Head) -> float:
    """Compare on the first texts of a corpus; returns the estimate of the total variation.

    ``rows``: these texts, with the engine's hidden states. ``corpus``: the Parquet file of the held-out text, with
    the engine's log-probabilities. ``head``: the teacher's, cut to the common vocabulary.

    Raises: ConfigError when the estimate is above :data:`TV_LIMIT`.
    """
    learner = np.concatenate([learner_logprobs(row, head) for row in rows])
    texts = read_table(corpus)["behavior_logprobs"].slice(0, len(rows))
    tv = total_variation(np.array(texts.combine_chunks().flatten()), learner)
    if not tv <= TV_LIMIT:
        raise ConfigError(
            "scoring.check",
            f"a total variation of {tv:.3f}",
            f"be at most {TV_LIMIT} between the teacher's engine and the learner on {len(learner)} tokens, because "
            "the student would be trained towards another distribution than the teacher's",
            "save the teacher again with save_pretrained, with tied heads equal and adapters merged, or report its "
            "architecture",
        )
    return tv


def learner_logprobs(batch: pa.RecordBatch, head: Head) -> np.ndarray:
    """[T]: the log-probability of a scored row's response tokens, from its hidden states and ``head``."""
    states = torch.from_numpy(hidden_rows(batch)[0].copy()).view(torch.bfloat16).to(head.weight.device)
    tokens = torch.tensor(batch.column("response_tokens")[0].as_py(), device=head.weight.device)
    found = [
        head.logits(part).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        for part, targets in zip(states.split(CHUNK), tokens.split(CHUNK), strict=True)
    ]
    return torch.cat(found).double().cpu().numpy()


def total_variation(sampled: np.ndarray, other: np.ndarray) -> float:
    """TV(p, q) = E_{x~p} max(0, 1 - q(x)/p(x)), estimated from tokens sampled from p.

    ``sampled``, ``other`` [N]: log p and log q of the tokens, nats.
    """
    return float(np.maximum(0, -np.expm1(other - sampled)).mean())
