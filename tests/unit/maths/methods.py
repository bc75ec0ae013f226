"""One method of every kind, and an update of the small student by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill.config import CreditConfig, CriticConfig, LearnerConfig, MethodConfig, RecipeConfig
from learner.model.head import Head
from learner.update.critics import CriticPair
from learner.update.update import update
from tests.unit.maths.batches import (
    Row,
    TinyStudent,
    batch_of,
    critic_pair,
    random_rows,
    teacher_head,
)

LEARNER = LearnerConfig(max_grad_norm=1e9, vocabulary_chunk=7)
CRITIC = CriticConfig(rank=4, max_grad_norm=1e9)


def method(
    recipe: RecipeConfig | None = None, critic: CriticConfig = CRITIC, credit: CreditConfig | None = None
) -> MethodConfig:
    return MethodConfig(
        recipe=recipe or RecipeConfig(), critic=critic, credit=credit or CreditConfig(), learner=LEARNER
    )


METHODS = {
    "ammd": method(RecipeConfig(lm_weight=0.1, loss_weight=0.8)),
    "ammd_paper": method(RecipeConfig(beta=0.5, anchor_weight=0.1, long_weight=0.7)),
    "off_policy": method(RecipeConfig(student_text="none", beta=0.5)),
    "on_policy": method(RecipeConfig(teacher_text="none", loss="reverse_kl")),
    "gkd": method(RecipeConfig(student_text="mixed", loss="generalized_jsd", jsd_beta=0.2, anchor_weight=0)),
    "kd": method(
        RecipeConfig(student_text="none", loss="forward_kl", loss_weight=0.5, anchor_weight=0, lm_weight=0.5)
    ),
    "sft": method(RecipeConfig(student_text="none", loss_weight=0, anchor_weight=0, lm_weight=1)),
    "sft_exact": method(
        RecipeConfig(student_text="none", loss_weight=0, anchor_weight=0, lm_weight=1, gamma=0.8),
        credit=CreditConfig(form="exact"),
    ),
    "anchor_only": method(RecipeConfig(loss_weight=0)),
    "jsd_and_critic": method(RecipeConfig(anchor="generalized_jsd", anchor_weight=1.0, loss_weight=0.3)),
    "two_skews": method(
        RecipeConfig(loss="skew_forward_kl", student_text_loss="skew_reverse_kl", skew=0.2, anchor_weight=0)
    ),
    "sign": method(RecipeConfig(long_weight=0.3), CriticConfig(form="sign", bound=1.5)),
    "closed_form": method(RecipeConfig(), CriticConfig(form="closed_form")),
    "dense": method(RecipeConfig(long_weight=0.3), replace(CRITIC, rank=None, features="both")),
    "ema": method(RecipeConfig(long_weight=0.3), replace(CRITIC, ema=0.9)),
    "blackbox": method(
        RecipeConfig(teacher_gives="text", student_text="none", loss_weight=5, lm_weight=1, anchor_weight=0)
    ),
    "exact": method(
        RecipeConfig(beta=0.4, long_weight=0.7, lm_weight=0.1, gamma=0.8),
        credit=CreditConfig(form="exact", ratio="per_decision", ratio_max=None),
    ),
    "per_decision": method(
        RecipeConfig(beta=0.4, long_weight=0.7, gamma=0.8),
        credit=CreditConfig(ratio="per_decision", ratio_max=1.5, normalize="length", span="all"),
    ),
    "per_decision_of_log_ratios": method(
        RecipeConfig(teacher_text="none", loss="reverse_kl", long_weight=1.0, anchor_weight=0),
        credit=CreditConfig(cost="log_ratio", ratio="per_decision", ratio_max=None),
    ),
    "no_ratio": method(
        RecipeConfig(long_weight=0.7), credit=CreditConfig(ratio="none", baseline="none", normalize="none")
    ),
    "minillm": method(
        RecipeConfig(teacher_text="none", loss="reverse_kl", long_weight=1.0, anchor_weight=0),
        credit=CreditConfig(
            cost="log_ratio",
            cost_scale=0.5,
            cost_max=2.0,
            span="all",
            normalize="length",
            baseline="whiten",
            ppo_clip=0.2,
        ),
    ),
    "opd": method(
        RecipeConfig(teacher_text="none", loss_weight=0, anchor_weight=0, long_weight=1.0),
        credit=CreditConfig(cost="log_ratio", span="own", normalize="none", baseline="none"),
    ),
}
RECIPES = {name: METHODS[name].recipe for name in METHODS}


def rows_for(recipe: RecipeConfig) -> list[Row]:
    return [
        row
        for row in random_rows()
        if (row.is_student_text and recipe.student_text != "none")
        or (not row.is_student_text and recipe.teacher_text != "none")
    ]


def run(
    method: MethodConfig,
    rows: Sequence[Row],
    packs: Sequence[Sequence[int]] | None = None,
    *,
    student: TinyStudent | None = None,
    teacher: Head | None = None,
) -> tuple[dict[str, float], dict[str, Tensor], CriticPair]:
    """Metrics, the student's gradients (a step of size 1), and the critics after one update."""
    student = student or TinyStudent()
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    critics = critic_pair(method.critic, shake=0.1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    learned = critics if method.critic.form == "learned" else None
    metrics = update(
        student, optimizer, batch_of(rows, packs), teacher or teacher_head(), learned, method, update_number=1
    )
    grads = {name: before[name] - value.detach() for name, value in student.named_parameters()}
    return metrics, grads, critics


def assert_same(left, right) -> None:
    """Metrics, gradients and critics of two runs."""
    torch.testing.assert_close(left[0], right[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(left[1], right[1], atol=1e-10, rtol=1e-9)
    for a, b in zip(left[2].parameters(), right[2].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
