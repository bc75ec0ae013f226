"""The learning rate as a function of the update: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate(
    update: int, num_updates: int, peak: float, warmup_fraction: float, final_fraction: float
) -> float:
    """Rate of update ``update`` (from 0): linear to ``peak``, then a cosine to ``final_fraction * peak``.

    The first update already has a rate above 0, and the last one has about the final rate.
    """
    warmup = max(1, math.ceil(warmup_fraction * num_updates))
    if update < warmup:
        return peak * (update + 1) / warmup
    progress = (update - warmup + 1) / max(1, num_updates - warmup)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
