"""Classifier two-sample test: can an independent classifier distinguish student and teacher text?

Lopez-Paz & Oquab, "Revisiting Classifier Two-Sample Tests" (2017). The classifier sees counts of token
n-grams and nothing of either model, so its features are independent of those of a recipe's critic. An
accuracy of 0.5 means that the texts are indistinguishable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

NUM_FEATURES = 4096
LONGEST_NGRAM = 3
NUM_FOLDS = 5
L2 = 1.0
"""The penalty ½ L2 |w|² is added to the summed log-loss."""


def correct_guesses(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> np.ndarray:
    """[n]: how many of the two answers to each prompt are classified correctly: 0, 1 or 2.

    ``left[i]`` and ``right[i]``: token ids of two answers to prompt i. The classifier that judges them is
    trained on the answers to other prompts.
    """
    features = torch.stack([_features(text) for texts in (left, right) for text in texts])
    features = features.view(2, len(left), NUM_FEATURES)
    fold = np.random.default_rng(0).permutation(len(left)) % NUM_FOLDS
    correct = np.zeros(len(left), np.int64)
    for held_out in range(NUM_FOLDS):
        test = torch.from_numpy(fold == held_out)
        weights, bias = _fit(features[:, ~test])
        scores = features[:, test] @ weights + bias  # positive: from the right
        correct[fold == held_out] = ((scores[0] < 0).int() + (scores[1] > 0).int()).numpy()
    return correct


def _features(tokens: Sequence[int]) -> Tensor:
    """log(1 + count) of hashed 1- to 3-grams, scaled to unit norm."""
    hashes = [
        xxhash.xxh3_64_intdigest(np.asarray(tokens[start : start + length], np.int64).tobytes())
        % NUM_FEATURES
        for length in range(1, LONGEST_NGRAM + 1)
        for start in range(len(tokens) - length + 1)
    ]
    counts = torch.from_numpy(np.bincount(hashes, minlength=NUM_FEATURES)).float()
    values = counts.log1p()
    return values / values.norm().clamp_min(1e-12)


def _fit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression on features [2, n, F]: the second half against the first."""
    inputs = features.flatten(0, 1)
    labels = torch.cat([torch.zeros(features.shape[1]), torch.ones(features.shape[1])])
    weights = torch.zeros(NUM_FEATURES, requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            inputs @ weights + bias, labels, reduction="sum"
        )
        loss = loss + L2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach(), bias.detach()
