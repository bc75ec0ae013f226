"""The two-sample classifier on texts of one source and of two."""

from __future__ import annotations

import numpy as np

from deploy.study.measure.two_sample import correct_guesses


def texts(seed: int, low: int, num_texts: int = 120) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(low, low + 40, 30).tolist() for _ in range(num_texts)]


def test_texts_of_one_source_are_distinguished_only_by_chance():
    share = correct_guesses(texts(0, 0), texts(1, 0)).mean() / 2
    assert 0.38 < share < 0.62  # 240 guesses: ± 3.7 standard errors
    assert correct_guesses(texts(0, 0), texts(1, 8)).mean() / 2 > 0.9
