"""DistiLLM's schedule against its published loop, on evaluations with a known loss."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from deploy.run.training.adaptive_share import AdaptiveShare
from distill.config import RecipeConfig
from distill.evaluation import EXTRA_METRICS, METRICS, Evaluation, save_evaluation
from distill.run.folder import RunFolder

RECIPE = RecipeConfig(student_text="mixed", student_fraction=0.0, fraction_step=0.1, loss="skew_forward_kl")


def evaluation(label: str, loss: float, num_prompts: int = 4) -> Evaluation:
    """Every prompt has ten tokens; losses differ between prompts, their mean is ``loss`` on the first two."""
    columns = {"prompt_index": np.arange(num_prompts)}
    for name in (*METRICS, *EXTRA_METRICS):
        columns[f"{name}.sum"] = 10 * (loss + np.array([0.5, -0.5, 3.0, 4.0][:num_prompts]))
        columns[f"{name}.weight"] = np.full(num_prompts, 10.0)
    return Evaluation(label, pa.table(columns))


def published(losses: list[float], start: float, step: float = 0.1, tolerance: float = 0.1) -> list[float]:
    """The thresholds of the published code, after each validation."""
    threshold, previous, found = start, losses[0], []
    for loss in losses[1:]:
        if loss >= previous + tolerance:
            threshold = min(threshold + step, 1.0)
            previous = loss
        found.append(threshold)
    return found


@pytest.mark.parametrize(
    ("losses", "start"),
    [
        ([2.0, 1.5, 1.4, 1.3], 0.0),
        ([2.0, 2.2, 2.25, 2.35, 2.1, 2.5], 0.0),
        ([1.0, 2.0, 3.0, 4.0], 0.85),
    ],
)
def test_the_share_is_the_published_one(tmp_path, losses, start):
    folder = RunFolder(tmp_path)
    folder.evaluations.mkdir(parents=True)
    save_evaluation(folder.evaluations, evaluation("before", losses[0]))
    recipe = RecipeConfig(student_text="mixed", student_fraction=start, fraction_step=0.1)
    share = AdaptiveShare(recipe, folder)
    shares = []
    for step, loss in enumerate(losses[1:]):
        found = evaluation(f"step-{step}", loss, num_prompts=2)  # fewer prompts than before training
        save_evaluation(folder.evaluations, found)
        old = share.share
        assert share.after_evaluation(found) == (share.share if share.share != old else None)
        shares.append(share.share)
        share = AdaptiveShare(recipe, folder, json.loads(json.dumps(share.state())))
    assert shares == pytest.approx(published(losses, start))


def test_a_fixed_share_reads_no_evaluation(tmp_path):
    share = AdaptiveShare(RecipeConfig(student_text="mixed"), RunFolder(tmp_path))
    assert share.after_evaluation(evaluation("step-1", 9.0)) is None
    assert share.share == 0.5
