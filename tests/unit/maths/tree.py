"""Random token trees on which every expectation is an exact sum.

Four tokens, the last of which is EOS, and texts of at most four tokens: a text ends with EOS or
is cut. States are the prefixes without EOS of length 0..3 (1 + 3 + 9 + 27 = 40); a text is one
of the 121 paths. R trees are computed at once, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

NUM_TOKENS = 4
EOS = 3
DEPTH = 4

PREFIXES = [prefix for length in range(DEPTH) for prefix in product(range(EOS), repeat=length)]
STATE = {prefix: number for number, prefix in enumerate(PREFIXES)}
NUM_STATES = len(PREFIXES)
DEPTH_OF = torch.tensor([len(prefix) for prefix in PREFIXES])

TEXTS = [
    text
    for length in range(1, DEPTH + 1)
    for text in product(range(NUM_TOKENS), repeat=length)
    if EOS not in text[:-1] and (text[-1] == EOS or length == DEPTH)
]


def visited(text: tuple[int, ...]) -> list[int]:
    """The state before each token of a text."""
    return [STATE[text[:t]] for t in range(len(text))]


@dataclass(frozen=True)
class Texts:
    """All texts as rectangles: [W, T] states and tokens, with a mask."""

    states: Tensor
    tokens: Tensor
    mask: Tensor


def all_texts() -> Texts:
    states = torch.zeros(len(TEXTS), DEPTH, dtype=torch.int64)
    tokens = torch.zeros_like(states)
    mask = torch.zeros(len(TEXTS), DEPTH, dtype=torch.bool)
    for number, text in enumerate(TEXTS):
        length = len(text)
        states[number, :length] = torch.tensor(visited(text))
        tokens[number, :length] = torch.tensor(text)
        mask[number, :length] = True
    return Texts(states, tokens, mask)


def random_logits(num_trees: int, seed: int, spread: float = 1.0) -> Tensor:
    """[R, S, V]: one policy per tree."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(num_trees, NUM_STATES, NUM_TOKENS, generator=generator, dtype=torch.float64)


def occupancy(logprobs: Tensor, gamma: float) -> Tensor:
    """[R, S]: γ^t times the probability that a text passes through the state at t."""
    probs = logprobs.exp()
    columns = [torch.ones_like(probs[:, 0, 0])]
    for prefix in PREFIXES[1:]:
        parent = STATE[prefix[:-1]]
        columns.append(gamma * columns[parent] * probs[:, parent, prefix[-1]])
    return torch.stack(columns, dim=1)


def action_values(logprobs: Tensor, rewards: Tensor, gamma: float) -> Tensor:
    """[R, S, V]: Q of a policy for rewards [R, S, V]; nothing follows EOS or the cut."""
    values: dict[int, Tensor] = {}
    q: dict[int, Tensor] = {}
    for state in reversed(range(NUM_STATES)):
        prefix = PREFIXES[state]
        following = torch.zeros_like(rewards[:, state])
        if len(prefix) < DEPTH - 1:
            for token in range(EOS):
                following[:, token] = values[STATE[(*prefix, token)]]
        q[state] = rewards[:, state] + gamma * following
        values[state] = (logprobs[:, state].exp() * q[state]).sum(-1)
    return torch.stack([q[state] for state in range(NUM_STATES)], dim=1)


def text_logprobs(logprobs: Tensor, texts: Texts) -> Tensor:
    """[R, W]: log-probability of every text."""
    return (logprobs[:, texts.states, texts.tokens] * texts.mask).sum(-1)
