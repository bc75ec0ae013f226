"""The student's part of an update: one optimizer step over all packs, with the critics fixed.

Legend: N positions (response tokens), B rows, T longest response, V vocabulary (the common prefix
of both models').
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.config import MethodConfig
from distill.objectives import cross_entropy, entropy, total_variation
from learner.batch import Pack, Text, TokenBatch
from learner.model.chunked import ChunkedLogits, LossOfChunk, chunked_loss
from learner.optimizer import require_finite
from learner.ranks import ALONE, Ranks
from learner.update import diagnostics
from learner.update.credit_step import Credit
from learner.update.losses import position_losses
from learner.update.positions import Heads, Policies, TrainedModel, teacher_hidden, to_floats
from learner.update.witness import Witness


def student_step(
    student: TrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: TokenBatch,
    heads: Heads | None,
    witnesses: Mapping[Text, Witness] | None,
    method: MethodConfig,
    credit: Credit | None = None,
    states: list[Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """One optimizer step of the student over all packs, with the critics fixed.

    ``heads``: None for a recipe that compares no distributions. ``witnesses``: that of each
    text, if the recipe has any. ``states``: the student's states of each pack with their graphs, if
    an earlier pass kept them; the list is emptied, so that each pack's activations are freed after use.

    Raises: Diverged when the loss or the gradient is not finite; the student is then unchanged.
    """
    optimizer.zero_grad(set_to_none=True)
    objective = _StudentObjective(student, batch, heads, witnesses, method, credit)
    sums: dict[str, Tensor] = {}
    for pack in batch.packs:
        hidden = states.pop(0) if states else student.states(pack)
        loss, metrics = objective.of_pack(pack, hidden)
        loss.backward()
        for name, value in ({"loss": loss.detach()} | metrics).items():
            sums[name] = sums[name] + value if name in sums else value
    ranks.sum_gradients(student.parameters())
    grad_norm = nn.utils.clip_grad_norm_(student.parameters(), method.learner.max_grad_norm)
    sums = ranks.sum_by_name(sums, batch.group.device)
    means = diagnostics.means(
        sums, {"teacher_text": batch.num_teacher_tokens, "student_text": batch.num_student_tokens}
    )
    metrics = to_floats(means | {"policy/grad_norm": grad_norm})
    require_finite(
        "the student", metrics["policy/loss"], metrics["policy/grad_norm"], "learner.learning_rate"
    )
    optimizer.step()
    return metrics


class _StudentObjective:
    """The loss of one update, as far as all its packs share it."""

    def __init__(
        self,
        student: TrainedModel,
        batch: TokenBatch,
        heads: Heads | None,
        witnesses: Mapping[Text, Witness] | None,
        method: MethodConfig,
        credit: Credit | None,
    ) -> None:
        self._student = student
        self._heads = heads
        self._witnesses = witnesses or {}
        self._method = method
        self._recipe = method.recipe
        self._penalty = method.critic.penalty if method.critic.zero_sum else 0.0
        self._chunk = method.learner.vocabulary_chunk
        self._credit = credit
        self._num_tokens: dict[Text, int] = {
            "teacher_text": batch.num_teacher_tokens,
            "student_text": batch.num_student_tokens,
        }
        num_rows: dict[Text, int] = {
            "teacher_text": batch.num_teacher_rows,
            "student_text": batch.num_student_rows,
        }
        self._denominator = num_rows if method.credit.form == "exact" else self._num_tokens
        self._lengths = _row_lengths(batch)

    def of_pack(self, pack: Pack, hidden: Float[Tensor, "N D"]) -> tuple[Tensor, dict[str, Tensor]]:
        """The pack's share of the loss, and its sums of the metrics, from the student's states.

        Positions are sorted by text, and no block contains both texts, so a block has one critic.
        """
        order, num_teacher = _sorted_by_text(pack)
        hidden = hidden.index_select(0, order)
        if self._heads is None:
            loss_of_chunk = self._text_loss(pack, order, num_teacher, hidden.dtype)
            num_tokens = None
        else:
            loss_of_chunk = self._policies_loss(pack, order, num_teacher, hidden.detach(), self._heads)
            num_tokens = self._heads.num_tokens
        return chunked_loss(
            hidden,
            self._student.head_weight,
            self._student.transform,
            loss_of_chunk,
            self._chunk,
            num_tokens=num_tokens,
            boundary=num_teacher,
        )

    def _text_loss(self, pack: Pack, order: Tensor, num_teacher: int, dtype: torch.dtype) -> LossOfChunk:
        """Cross-entropy only: for recipes that use nothing of the teacher but its text."""
        targets = pack.targets[order]
        weight = self._weights(pack, order, dtype)

        def loss_of_chunk(where: slice, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs = logits.log_softmax(-1)
            text = _text_at(where, num_teacher)
            metrics = {f"{text}.entropy": entropy(logprobs.detach()).sum()}
            if text == "student_text":
                return torch.zeros_like(metrics["student_text.entropy"]), metrics
            losses = self._recipe.lm_weight * cross_entropy(logprobs, targets[where])
            return (weight[where] * losses).sum() / self._denominator["teacher_text"], metrics

        return loss_of_chunk

    def _policies_loss(
        self, pack: Pack, order: Tensor, num_teacher: int, hidden: Tensor, heads: Heads
    ) -> LossOfChunk:
        """All terms, from the full distributions of both policies."""
        features = teacher_hidden(pack)[order]
        teacher_logits = ChunkedLogits(heads.teacher, features, self._chunk)
        values = {
            text: witness.at(features, hidden, self._chunk) for text, witness in self._witnesses.items()
        }
        targets, row, step = pack.targets[order], pack.row[order], pack.step[order]
        behavior = pack.behavior_logprobs[order]
        weight = self._weights(pack, order, hidden.dtype)
        advantage = None if self._credit is None else _look_up(self._credit.advantage, row, step)

        def loss_of_chunk(where: slice, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            text = _text_at(where, num_teacher)
            both = Policies.from_logits(logits, teacher_logits(where))
            with torch.no_grad():
                log_ratio = both.log_ratio()
                f = values[text](where, both, log_ratio) if values else None
            losses = position_losses(
                self._recipe,
                text,
                both,
                targets[where],
                f=f,
                variance_penalty=self._penalty,
                advantage=None if advantage is None else advantage[where],
                behavior_logprobs=behavior[where],
                ppo_clip=self._method.credit.ppo_clip,
            )
            fixed = both.detach()
            tv = total_variation(*fixed.pair, **fixed.probs)
            sums = diagnostics.of_policies(text, fixed, tv, log_ratio, f)
            if text == "student_text":
                tokens, length = targets[where], self._lengths[row[where]]
                sums |= diagnostics.of_student_text(fixed, tv, tokens, step[where], length, behavior[where])
                if advantage is not None and f is not None and self._recipe.loss_weight > 0:
                    scale = self._recipe.long_weight / self._recipe.loss_weight
                    sums |= diagnostics.of_gradients(fixed, f, tokens, scale * advantage[where])
            return (weight[where] * losses).sum() / self._denominator[text], sums

        return loss_of_chunk

    def _weights(self, pack: Pack, order: Tensor, dtype: torch.dtype) -> Float[Tensor, " N"]:
        """Weight of each position's losses: 1, or γ^t with ``credit.form=exact``, times the ratios before it."""
        row, step = pack.row[order], pack.step[order]
        wide = torch.promote_types(dtype, torch.float32)
        weight = torch.ones(len(order), dtype=wide, device=order.device)
        if self._method.credit.form == "exact":
            weight = self._recipe.gamma ** step.to(wide)
        if self._credit is not None and self._credit.weight is not None:
            before = _look_up(self._credit.weight, row, step)
            weight = torch.where(pack.is_student_text[order], weight * before, weight)
        return weight


def _text_at(where: slice, num_teacher: int) -> Text:
    return "teacher_text" if where.stop <= num_teacher else "student_text"


def _sorted_by_text(pack: Pack) -> tuple[Int[Tensor, " N"], int]:
    """The counted positions, teacher text first, and the number of those of teacher text."""
    teacher = (pack.counted & ~pack.is_student_text).nonzero().squeeze(1)
    student = (pack.counted & pack.is_student_text).nonzero().squeeze(1)
    return torch.cat([teacher, student]), len(teacher)


def _row_lengths(batch: TokenBatch) -> Int[Tensor, " B"]:
    """Response tokens of each row."""
    lengths = torch.zeros_like(batch.group)
    for pack in batch.packs:
        lengths.scatter_reduce_(0, pack.row, pack.step + 1, "amax")
    return lengths


def _look_up(
    rows: Float[Tensor, "B T"], row: Int[Tensor, " N"], step: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Values of some positions; 0 beyond the longest row of student text."""
    if rows.shape[1] == 0:
        return rows.new_zeros(len(row))
    return torch.where(step < rows.shape[1], rows[row, step.clamp_max(rows.shape[1] - 1)], 0.0)
