"""One update: first the critics, then the student against them.

Read :func:`update` first, then :func:`critic_update` and :func:`student_update`. Why this order:

1. The student's states at all response positions are kept from one pass without gradients. The
   critics read them as constants, so no critic step runs the backbone again.
2. K critic steps, each on its own slice of the positions: a critic step needs the logits of
   both policies, and so they are formed once per position whatever K is. The first slice is
   measured before its step, while it is fresh to the critic (in-sample, tightness flatters).
3. With a long horizon, the moment gaps of the student's text under the new critics become
   advantages. A token's credit needs its whole row and group, micro-batches see parts of them.
4. The student step: the packs are micro-batches that accumulate one gradient. Every term has
   the whole update's number of tokens as its denominator, so where rows are packed is nothing
   the student can notice.

The student minimises, with w the weights of the two texts ((1−β, β), or 1 for a text without the
other), f1 and f2 the critics, constants here, and every mean over the tokens of one text:

    w_off mean[ g_f1 ] + w_on mean[ g_f2 ] + w_on c_long mean[ log π(a_t) A_t ]
      + η_kl mean_off[ KL(π* || π) ] + η_lm mean_off[ −log π(y_t) ]

with another divergence in place of both g when the recipe says so. At π = π* the first two and
the fourth are 0 whatever the critics are.

Legend: L inputs of a pack, N positions (response tokens), B rows, T longest response, D features,
V vocabulary (the common prefix of both models' vocabularies).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.config import CriticConfig, LearnerConfig, RecipeConfig
from distill.credit import advantages, to_rows
from distill.objectives import (
    closed_form_critic,
    critic_loss,
    cross_entropy,
    entropy,
    forward_kl,
    generalized_jsd,
    moment_gap,
    policy_gradient,
    reverse_kl,
    total_variation,
)
from learner.batch import Pack, TokenBatch
from learner.critics import SOURCES, Critic, CriticPair, Source
from learner.vocabulary import ChunkedLogits, Head, LogitTransform, LossOfChunk, chunked_blocks, chunked_loss

SATURATION = 0.95
"""An action value beyond this share of the bound counts as saturated."""


@runtime_checkable
class Student(Protocol):
    """What an update needs of the model in training."""

    @property
    def head_weight(self) -> nn.Parameter: ...

    @property
    def transform(self) -> LogitTransform: ...

    def states(self, pack: Pack) -> Tensor:
        """[N, D]: final-norm hidden states before the pack's response tokens."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]: ...


class Policies(NamedTuple):
    """Both policies at some positions, each exponential taken once. The teacher is a constant."""

    policy_logprobs: Float[Tensor, "N V"]
    teacher_logprobs: Float[Tensor, "N V"]
    policy_probs: Float[Tensor, "N V"]
    teacher_probs: Float[Tensor, "N V"]

    @classmethod
    def from_logits(cls, policy_logits: Tensor, teacher_logits: Tensor) -> Policies:
        policy_logprobs = policy_logits.log_softmax(-1)
        with torch.no_grad():
            teacher_logprobs = teacher_logits.log_softmax(-1)
            teacher_probs = teacher_logprobs.exp()
        return cls(policy_logprobs, teacher_logprobs, policy_logprobs.exp(), teacher_probs)

    def detach(self) -> Policies:
        return Policies(*(value.detach() for value in self))

    def log_ratio(self) -> Tensor:
        """log ρ = log π*/π."""
        return self.teacher_logprobs - self.policy_logprobs

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """First two arguments of an objective."""
        return self.policy_logprobs, self.teacher_logprobs

    @property
    def probs(self) -> dict[str, Tensor]:
        """What spares an objective the exponentials."""
        return {"policy_probs": self.policy_probs, "teacher_probs": self.teacher_probs}


@dataclass(frozen=True)
class Positions:
    """The counted response positions of a batch, flat, as the critics see them: constants."""

    student_hidden: Float[Tensor, "N Ds"]
    teacher_hidden: Float[Tensor, "N Dt"]
    on_policy: Bool[Tensor, " N"]
    row: Int[Tensor, " N"]
    step: Int[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.row)

    def select(self, mask: Bool[Tensor, " N"]) -> Positions:
        return Positions(**{name: value[mask] for name, value in vars(self).items()})

    def of(self, source: Source) -> Positions:
        return self.select(self.on_policy if source == "on" else ~self.on_policy)


@dataclass(frozen=True)
class Heads:
    """The unembeddings of both models over their common vocabulary, as constants."""

    student: Head
    teacher: Head

    @classmethod
    def of(cls, student: Student, teacher: Head) -> Heads:
        head = Head(student.head_weight.detach(), student.transform)
        num_tokens = min(head.num_tokens, teacher.num_tokens)
        return cls(head.prefix(num_tokens), teacher.prefix(num_tokens))

    @property
    def num_tokens(self) -> int:
        return self.teacher.num_tokens


def update(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: TokenBatch,
    teacher: Head | None,
    critics: CriticPair | None,
    recipe: RecipeConfig,
    critic: CriticConfig,
    learner: LearnerConfig,
    *,
    seed: int,
    critics_only: bool = False,
) -> dict[str, float]:
    """Critics, then student; returns the metrics of this update.

    ``teacher`` may be None for a recipe without teacher payload, ``critics`` for one without
    critics. ``seed`` chooses which positions each critic step sees; pass the update's number.
    ``critics_only``: a warm-up update, the student stays.
    """
    metrics: dict[str, float] = {}
    credit: Tensor | None = None
    if needs_critics(recipe):
        if teacher is None or critics is None:
            raise ValueError(f"recipe {recipe.name} needs a teacher head and critics")
        chunk = learner.vocabulary_chunk
        heads = Heads.of(student, teacher)
        positions = collect_positions(student, batch)
        metrics |= critic_update(positions, heads, critics, critic, chunk=chunk, seed=seed)
        if recipe.long_weight > 0 and not critics_only:
            rollouts = positions.of("on")
            gaps = moment_gaps(rollouts, heads, critics.on, chunk=chunk)
            rows, mask = to_rows(gaps, rollouts.row, rollouts.step, len(batch.group))
            credit = advantages(rows, mask, batch.group, recipe.gamma)
    if not critics_only:
        metrics |= student_update(
            student, optimizer, batch, teacher, critics, recipe, critic, learner, credit
        )
    return metrics


def needs_critics(recipe: RecipeConfig) -> bool:
    """False also where the main loss is switched off (an anchor alone, cross-entropy alone)."""
    return recipe.uses_critics and recipe.loss_weight > 0


@torch.no_grad()
def collect_positions(student: Student, batch: TokenBatch) -> Positions:
    """One pass over the packs without gradients."""
    parts = []
    for pack in batch.packs:
        part = Positions(student.states(pack), teacher_hidden(pack), pack.on_policy, pack.row, pack.step)
        parts.append(part.select(pack.counted))
    return Positions(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def teacher_hidden(pack: Pack) -> Tensor:
    if pack.teacher_hidden is None:
        raise ValueError("a pack without teacher states, in a recipe whose losses need the teacher's policy")
    return pack.teacher_hidden


def critic_update(
    positions: Positions,
    heads: Heads,
    critics: CriticPair,
    config: CriticConfig,
    *,
    chunk: int,
    seed: int,
) -> dict[str, float]:
    """K steps of both critics, on K disjoint slices of the positions.

    A slice is every K-th token of every row, starting at ``seed``: it depends on nothing but a
    token's place in its row, so neither packing nor the order of rows changes it.
    """
    sums: dict[str, list[Tensor]] = {}
    slice_of = (positions.step + seed) % config.num_steps
    for number in range(config.num_steps):
        critics.zero_grad()
        for source in SOURCES:
            part = positions.select(slice_of == number).of(source)
            if len(part):
                measure = f"critic/d_mm_{source}" not in sums
                means = _critic_gradient(part, heads, critics[source], config, chunk, measure)
                for name, value in means.items():
                    sums.setdefault(f"critic/{name}_{source}", []).append(value)
        sums.setdefault("critic/grad_norm", []).append(critics.step())
    return _tightness(_to_floats({name: torch.stack(values).mean() for name, values in sums.items()}))


def _critic_gradient(
    positions: Positions, heads: Heads, critic: Critic, config: CriticConfig, chunk: int, measure: bool
) -> dict[str, Tensor]:
    """Add the gradient of the mean critic loss over the positions; returns means."""
    policy_logits = ChunkedLogits(heads.student, positions.student_hidden, chunk)
    teacher_logits = ChunkedLogits(heads.teacher, positions.teacher_hidden, chunk)

    def loss_of_chunk(where: slice, bilinear: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            both = Policies.from_logits(policy_logits(where), teacher_logits(where))
            log_ratio = both.log_ratio()
        f = critic.activate(bilinear, log_ratio)
        loss = critic_loss(*both.pair, f, config.penalty, **both.probs).sum() / len(positions)
        return loss, _critic_metrics(both, f.detach(), config) if measure else {}

    loss, metrics = chunked_loss(
        critic.coefficients(positions.teacher_hidden, positions.student_hidden),
        critic.table(heads.teacher, heads.student),
        LogitTransform(),
        loss_of_chunk,
        chunk,
        parameters=critic.extra_parameters(),
    )
    loss.backward()
    return {"loss": loss.detach()} | {name: value / len(positions) for name, value in metrics.items()}


@torch.no_grad()
def _critic_metrics(both: Policies, f: Tensor, config: CriticConfig) -> dict[str, Tensor]:
    """Sums of the gap, of the gap of the best critic, and of the mass that has saturated values."""
    best = closed_form_critic(*both.pair, config.bound, config.penalty, **both.probs)
    saturated = (f.abs() > SATURATION * config.bound).to(f.dtype)
    mean_probs = (both.policy_probs + both.teacher_probs) / 2
    return {
        "d_mm": moment_gap(*both.pair, f, **both.probs).sum(),
        "best": moment_gap(*both.pair, best, **both.probs).sum(),
        "saturation": torch.linalg.vecdot(mean_probs, saturated).sum(),
    }


def _tightness(metrics: dict[str, float]) -> dict[str, float]:
    """Replace the best critic's gap by the share of it that the critic reaches (1 if it is 0)."""
    for source in SOURCES:
        best = metrics.pop(f"critic/best_{source}", None)
        if best is not None:
            gap = metrics[f"critic/d_mm_{source}"]
            metrics[f"critic/tightness_{source}"] = gap / best if best > 0 else 1.0
    return metrics


@torch.no_grad()
def moment_gaps(positions: Positions, heads: Heads, critic: Critic, *, chunk: int) -> Float[Tensor, " N"]:
    """g_f at every position, without gradients."""
    policy_logits = ChunkedLogits(heads.student, positions.student_hidden, chunk)
    teacher_logits = ChunkedLogits(heads.teacher, positions.teacher_hidden, chunk)
    coefficients = critic.coefficients(positions.teacher_hidden, positions.student_hidden)
    table = critic.table(heads.teacher, heads.student)
    gaps = coefficients.new_zeros(len(positions))
    for where in chunked_blocks(len(positions), heads.num_tokens, chunk, gaps.device):
        both = Policies.from_logits(policy_logits(where), teacher_logits(where))
        f = critic.activate(coefficients[where] @ table.T, both.log_ratio())
        gaps[where] = moment_gap(*both.pair, f, **both.probs)
    return gaps


def text_weights(recipe: RecipeConfig) -> dict[Source, float]:
    """Weight of the main loss on either text: 1 − β and β when every update holds both."""
    if recipe.student_text == "every_update" and recipe.off_policy_text != "none":
        return {"off": 1 - recipe.beta, "on": recipe.beta}
    return {"off": 1.0, "on": 1.0}


def position_losses(
    recipe: RecipeConfig,
    source: Source,
    both: Policies,
    targets: Int[Tensor, " N"],
    *,
    f: Float[Tensor, "N V"] | None = None,
    variance_penalty: float = 0.0,
    advantage: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """The student's loss at each position of one text; a recipe is what this adds up.

    ``f``: the critic's values, constants. ``variance_penalty``: λ of the zero-sum game, in which
    the student sees the penalty too; 0 hides it. ``advantage``: A_t of tokens that the student
    sampled.
    """
    loss = torch.zeros_like(both.policy_logprobs[:, 0])
    weight = text_weights(recipe)[source]
    if weight * recipe.loss_weight > 0:
        loss = loss + weight * recipe.loss_weight * _main_loss(recipe, both, f, variance_penalty)
    if source == "on" and advantage is not None and weight * recipe.long_weight > 0:
        long_horizon = policy_gradient(both.policy_logprobs, targets, advantage)
        loss = loss + weight * recipe.long_weight * long_horizon
    if source == "off" and recipe.anchor_weight > 0:
        anchor = forward_kl(*both.pair, teacher_probs=both.teacher_probs)
        loss = loss + recipe.anchor_weight * anchor
    if source == "off" and recipe.lm_weight > 0:
        loss = loss + recipe.lm_weight * cross_entropy(both.policy_logprobs, targets)
    return loss


def _main_loss(recipe: RecipeConfig, both: Policies, f: Tensor | None, variance_penalty: float) -> Tensor:
    if recipe.loss == "forward_kl":
        return forward_kl(*both.pair, teacher_probs=both.teacher_probs)
    if recipe.loss == "reverse_kl":
        return reverse_kl(*both.pair, policy_probs=both.policy_probs)
    if recipe.loss == "generalized_jsd":
        return generalized_jsd(*both.pair, recipe.jsd_beta, **both.probs)
    if f is None:
        raise ValueError("the moment gap needs a critic's values")
    if variance_penalty > 0:
        return -critic_loss(*both.pair, f.detach(), variance_penalty, **both.probs)
    return moment_gap(*both.pair, f.detach(), **both.probs)


def student_update(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: TokenBatch,
    teacher: Head | None,
    critics: CriticPair | None,
    recipe: RecipeConfig,
    critic: CriticConfig,
    learner: LearnerConfig,
    credit: Float[Tensor, "B T"] | None = None,
) -> dict[str, float]:
    """One optimiser step of the student over all packs, the critics held fixed.

    ``credit``: advantages of the student's tokens by row and step (:mod:`distill.credit`).

    Raises: FloatingPointError when loss or gradient is not finite; nothing has moved then.
    """
    optimizer.zero_grad(set_to_none=True)
    heads = None
    if recipe.payload != "text":
        if teacher is None:
            raise ValueError(f"recipe {recipe.name} needs the teacher's head")
        heads = Heads.of(student, teacher)
    frozen = _freeze(critics, heads) if needs_critics(recipe) else None
    objective = _StudentObjective(student, batch, heads, frozen, recipe, critic, learner, credit)
    sums: dict[str, Tensor] = {}
    for pack in batch.packs:
        loss, metrics = objective.of_pack(pack)
        loss.backward()
        for name, value in ({"loss": loss.detach()} | metrics).items():
            sums[name] = sums[name] + value if name in sums else value
    grad_norm = nn.utils.clip_grad_norm_(student.parameters(), learner.max_grad_norm)
    metrics = _to_floats(objective.means(sums) | {"policy/grad_norm": grad_norm})
    if not (math.isfinite(metrics["policy/loss"]) and math.isfinite(metrics["policy/grad_norm"])):
        raise FloatingPointError(
            f"the student's loss is {metrics['policy/loss']} and its gradient's norm "
            f"{metrics['policy/grad_norm']}: the student was not changed"
        )
    optimizer.step()
    return metrics


class _FrozenCritic(NamedTuple):
    """A critic and its table, made once for all packs."""

    critic: Critic
    table: Float[Tensor, "V R"]


@torch.no_grad()
def _freeze(critics: CriticPair | None, heads: Heads | None) -> dict[str, _FrozenCritic]:
    if critics is None or heads is None:
        raise ValueError("the moment gap needs critics and the teacher's head")
    return {
        source: _FrozenCritic(critics[source], critics[source].table(heads.teacher, heads.student))
        for source in SOURCES
    }


class _StudentObjective:
    """The loss of one update: what all its packs share."""

    def __init__(
        self,
        student: Student,
        batch: TokenBatch,
        heads: Heads | None,
        critics: dict[str, _FrozenCritic] | None,
        recipe: RecipeConfig,
        critic: CriticConfig,
        learner: LearnerConfig,
        credit: Tensor | None,
    ) -> None:
        self._student = student
        self._heads = heads
        self._critics = critics
        self._recipe = recipe
        self._penalty = critic.penalty if critic.zero_sum else 0.0
        self._chunk = learner.vocabulary_chunk
        self._credit = credit
        self._num_tokens: dict[Source, int] = {"off": batch.num_off_policy, "on": batch.num_on_policy}
        self._lengths = _row_lengths(batch)

    def of_pack(self, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
        """The pack's share of the loss, and its sums of the metrics.

        Positions are sorted by source, and no block holds both, so a block has one critic.
        """
        order, num_off = _sorted_by_source(pack)
        hidden = self._student.states(pack).index_select(0, order)
        if self._heads is None:
            loss_of_chunk = self._text_loss(pack, order, num_off)
            num_tokens = None
        else:
            loss_of_chunk = self._policies_loss(pack, order, num_off, hidden.detach(), self._heads)
            num_tokens = self._heads.num_tokens
        return chunked_loss(
            hidden,
            self._student.head_weight,
            self._student.transform,
            loss_of_chunk,
            self._chunk,
            num_tokens=num_tokens,
            boundary=num_off,
        )

    def _text_loss(self, pack: Pack, order: Tensor, num_off: int) -> LossOfChunk:
        """Cross-entropy alone: the recipes of a teacher that only wrote the text."""
        targets = pack.targets[order]

        def loss_of_chunk(where: slice, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs = logits.log_softmax(-1)
            source = _source(where, num_off)
            metrics = {f"entropy_{source}": entropy(logprobs.detach()).sum()}
            if source == "on":
                return torch.zeros_like(metrics["entropy_on"]), metrics
            losses = self._recipe.lm_weight * cross_entropy(logprobs, targets[where])
            return losses.sum() / self._num_tokens["off"], metrics

        return loss_of_chunk

    def _policies_loss(
        self, pack: Pack, order: Tensor, num_off: int, hidden: Tensor, heads: Heads
    ) -> LossOfChunk:
        """All terms, from both policies' full distributions."""
        features = teacher_hidden(pack)[order]
        teacher_logits = ChunkedLogits(heads.teacher, features, self._chunk)
        bilinear = self._bilinear(features, hidden)
        targets, row, step = pack.targets[order], pack.row[order], pack.step[order]
        behavior = pack.behavior_logprobs[order]
        advantage = None if self._credit is None else _look_up(self._credit, row, step)

        def loss_of_chunk(where: slice, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            source = _source(where, num_off)
            both = Policies.from_logits(logits, teacher_logits(where))
            with torch.no_grad():
                log_ratio = both.log_ratio()
                f = None
                if self._critics is not None:
                    f = self._critics[source].critic.activate(bilinear[source](where), log_ratio)
            losses = position_losses(
                self._recipe,
                source,
                both,
                targets[where],
                f=f,
                variance_penalty=self._penalty,
                advantage=None if advantage is None else advantage[where],
            )
            metrics = _policy_metrics(both.detach(), log_ratio, f)
            if source == "on":
                metrics |= _drift(metrics["tv"], step[where], self._lengths[row[where]])
                policy = -cross_entropy(both.policy_logprobs.detach(), targets[where])
                metrics["behavior_gap"] = behavior[where] - policy
            sums = {_metric_name(name, source): value.sum() for name, value in metrics.items()}
            return losses.sum() / self._num_tokens[source], sums

        return loss_of_chunk

    @torch.no_grad()
    def _bilinear(self, features: Tensor, hidden: Tensor) -> dict[str, ChunkedLogits]:
        """The critics' arguments at all positions of a pack; a chunk is formed when it is asked for."""
        return {
            source: ChunkedLogits(
                Head(table, LogitTransform()), critic.coefficients(features, hidden), self._chunk
            )
            for source, (critic, table) in (self._critics or {}).items()
        }

    def means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all packs to means over the tokens they count."""
        means = {}
        for name, value in sums.items():
            if name.startswith("num_"):
                continue
            if name == "loss":
                count = 1
            elif name.endswith("_third"):
                count = sums[f"num_{name}"].clamp_min(1)
            else:
                count = self._num_tokens["off" if name.endswith("_off") else "on"]
            means[f"policy/{name}"] = value / count
        return means


def _source(where: slice, num_off: int) -> Source:
    return "off" if where.stop <= num_off else "on"


def _sorted_by_source(pack: Pack) -> tuple[Int[Tensor, " N"], int]:
    """The counted positions, off-policy text first, and how many of them are off-policy."""
    off = (pack.counted & ~pack.on_policy).nonzero().squeeze(1)
    on = (pack.counted & pack.on_policy).nonzero().squeeze(1)
    return torch.cat([off, on]), len(off)


def _row_lengths(batch: TokenBatch) -> Int[Tensor, " B"]:
    """Response tokens of each row."""
    lengths = torch.zeros_like(batch.group)
    for pack in batch.packs:
        lengths.scatter_reduce_(0, pack.row, pack.step + 1, "amax")
    return lengths


def _look_up(
    credit: Float[Tensor, "B T"], row: Int[Tensor, " N"], step: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Advantages of some positions; rows longer than the longest on-policy one have none."""
    inside = step < credit.shape[1]
    if credit.shape[1] == 0:
        return credit.new_zeros(len(row))
    return torch.where(inside, credit[row, step.clamp_max(credit.shape[1] - 1)], 0.0)


@torch.no_grad()
def _policy_metrics(both: Policies, log_ratio: Tensor, f: Tensor | None) -> dict[str, Tensor]:
    """Exact divergences of the policies at each position, and the gap that the critic sees.

    Both divergences from the one log-ratio: the logits of a batch are finite, and every pass over
    the vocabulary is felt.
    """
    metrics = {
        "tv": total_variation(*both.pair, **both.probs),
        "forward_kl": torch.linalg.vecdot(both.teacher_probs, log_ratio),
        "reverse_kl": -torch.linalg.vecdot(both.policy_probs, log_ratio),
        "entropy": entropy(both.policy_logprobs, policy_probs=both.policy_probs),
    }
    if f is not None:
        metrics["moment_gap"] = moment_gap(*both.pair, f, **both.probs)
    return metrics


def _drift(tv: Tensor, step: Tensor, length: Tensor) -> dict[str, Tensor]:
    """TV in the first and last ⌊T/3⌋ tokens of responses of T tokens."""
    third = length // 3
    first, last = (step < third).to(tv.dtype), (step >= length - third).to(tv.dtype)
    return {
        "tv_on_first_third": tv * first,
        "tv_on_last_third": tv * last,
        "num_tv_on_first_third": first,
        "num_tv_on_last_third": last,
    }


def _metric_name(name: str, source: Source) -> str:
    return name if name == "behavior_gap" or name.endswith("_third") else f"{name}_{source}"


def _to_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """All at once: one wait for the device."""
    if not metrics:
        return {}
    values = torch.stack([value.detach().double().reshape(()) for value in metrics.values()])
    return dict(zip(metrics, values.tolist(), strict=True))
