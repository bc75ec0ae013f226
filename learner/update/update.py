"""One update of the game: first the critics, then the student against them.

The steps, numbered and named as in docs/method.md, "The algorithm":

    Input: student text with log μ(a_t); teacher text; the teacher's states h*; π, π*, f1, f2

    1  States        h of π at every response position of both texts             collect_positions()
    2  Critic steps  K times, on disjoint slices of the positions:               critic_step()
                       f1 ← Adam on mean[ −g_f1 + (λ/2) Var_m f1 ]   teacher text
                       f2 ← Adam on mean[ −g_f2 + (λ/2) Var_m f2 ]   student text
                     then f1 and f2 are constants                                witnesses()
    3  Credit        A_t = R_t − b_t from the gaps that follow token t           assign_credit()
    4  Student step  (1−β) c_loss mean[ g_f1 ]              teacher text         student_step()
                     +  β  c_loss mean[ g_f2 ]              student text
                     +  β  c_long mean[ log π(a_t) A_t ]    student text
                     +     η_kl   mean[ D(π*, π) ]          teacher text
                     +     η_lm   mean[ −log π(y_t) ]       teacher text
    5  Optimizer     clip the gradient; AdamW                                    student_step()
       step

with g_f(s) = Σ_a (π*(a|s) − π(a|s)) f(s, a), the moment gap, and D the anchor (forward KL by default).
A recipe replaces both gaps by a divergence, or drops terms; an update with one text weighs it 1
instead of 1−β or β. With ``credit.form=exact`` a mean of step 4 is a sum with weights γ^t over every
response, divided by the number of responses: L_off and L_on themselves. A mean of step 2 then has the same
weights, divided by their sum. At π = π* the gaps and the anchor are 0 whatever the critics are.

| what                 | terms                                          | file                          |
|----------------------|------------------------------------------------|-------------------------------|
| a critic's loss      | −g_f + (λ/2) Var_m f                           | :mod:`.critic_step`           |
| a position's losses  | main loss, long horizon, anchor, cross-entropy | :mod:`.losses`                |
| their formulas       | every divergence, gap and policy gradient      | :mod:`distill.objectives`     |
| a token's advantage  | returns, baselines, importance ratios          | :mod:`distill.credit`         |

Why this order. The critics read the student's states as constants, so one pass serves all K critic
steps (and, with ``learner.keep_activations``, the student's step too). A critic step needs the logits of
both policies, which are formed once per position whatever K is. The student plays against critics that
have seen this update's text. Packs are micro-batches that accumulate one gradient, and every term is
divided by the whole update's tokens, so the student cannot notice how rows are packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from distill.config import MethodConfig
from distill.errors import Diverged
from learner.batch import Text, TokenBatch
from learner.model.head import Head
from learner.ranks import ALONE, Ranks
from learner.update.credit_step import Credit, assign_credit, needs_credit
from learner.update.critic_step import critic_step
from learner.update.critics import CriticPair
from learner.update.positions import Heads, Positions, TrainedModel, collect_positions
from learner.update.student_step import student_step
from learner.update.witness import Witness, witnesses

Stage = Literal["scores", "critics", "student"]


def update(
    student: TrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: TokenBatch,
    teacher: Head | None,
    critics: CriticPair | None,
    method: MethodConfig,
    *,
    update_number: int,
    warmup: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Critics, then student; returns the metrics of this update.

    ``teacher`` may be None for a recipe without teacher payload, ``critics`` for one without learned
    critics. ``update_number`` (from 0) decides which positions each critic step sees.
    ``warmup``: whether this is a warm-up update, which leaves the student alone if there are learned critics.
    ``ranks``: who else has groups of this update; metrics and step are then the same on all.

    Raises: Diverged, with its stage, when a score, loss or gradient is not finite, on all ranks alike. The
    student is then unchanged; critics may have taken steps, which the caller undoes.
    """
    batch = batch.over(ranks)
    if method.recipe.payload == "text":  # cross-entropy only: no distributions, no game
        with _stage("student"):
            return student_step(student, optimizer, batch, None, None, method, ranks=ranks)
    with _stage("scores"):
        require_finite_scores(batch, ranks)
    if teacher is None:
        raise ValueError(f"recipe {method.recipe.name} needs the teacher's head")
    heads = Heads.of(student, teacher)
    learned_critics = critics if method.uses_moment_gap else None
    needs_advantages = (
        needs_credit(method.recipe, method.credit) and batch.num_student_tokens > 0 and not warmup
    )
    metrics: dict[str, float] = {}
    states: list[Tensor] | None = None
    credit: Credit | None = None

    if learned_critics or needs_advantages:  # 1
        keep_graph = method.learner.keep_activations and not warmup
        positions, states = collect_positions(student, batch, keep_graph=keep_graph)
    if learned_critics:  # 2
        with _stage("critics"):
            metrics = _critics(positions, heads, learned_critics, method, update_number, warmup, ranks)
        if warmup:
            return metrics
    witness_of = witnesses(method.critic, critics, heads) if method.uses_moment_gap else {}
    if needs_advantages:  # 3
        credit = _credit(positions, batch, heads, witness_of, method, ranks)
    with _stage("student"):  # 4, 5
        student_metrics = student_step(
            student, optimizer, batch, heads, witness_of, method, credit, states, ranks=ranks
        )
    return metrics | student_metrics


@contextmanager
def _stage(stage: Stage) -> Iterator[None]:
    try:
        yield
    except Diverged as error:
        error.stage = stage
        raise


def require_finite_scores(batch: TokenBatch, ranks: Ranks) -> None:
    """Raises: Diverged when a counted position has a score that is not finite, on any rank."""
    wrong = torch.zeros((), dtype=torch.int64, device=batch.group.device)
    for pack in batch.packs:
        wrong += (pack.counted & pack.scores_not_finite()).sum()
    count = int(ranks.sum(wrong))
    if count:
        raise Diverged(
            "the teacher's states and the sampler's log-probabilities",
            f"{count} tokens with NaN or infinity",
            "be finite",
            "look at the engines, which wrote them; neither student nor critics have changed",
        )


def _critics(
    positions: Positions,
    heads: Heads,
    critics: CriticPair,
    method: MethodConfig,
    update_number: int,
    warmup: bool,
    ranks: Ranks,
) -> dict[str, float]:
    recipe = method.recipe
    return critic_step(
        positions,
        heads,
        critics,
        method.critic,
        chunk=method.learner.vocabulary_chunk,
        update_number=update_number,
        warmup=warmup,
        from_text=recipe.teacher_gives == "text",
        discount=recipe.gamma if method.credit.form == "exact" else 1.0,
        ranks=ranks,
    )


def _credit(
    positions: Positions,
    batch: TokenBatch,
    heads: Heads,
    witness_of: Mapping[Text, Witness],
    method: MethodConfig,
    ranks: Ranks,
) -> Credit:
    return assign_credit(
        positions.of("student_text"),
        batch.group,
        heads,
        witness_of.get("student_text"),
        method.recipe,
        method.credit,
        chunk=method.learner.vocabulary_chunk,
        variance_penalty=method.critic.penalty if method.critic.zero_sum else 0.0,
        ranks=ranks,
    )
