"""Sums over the processes that share one update: gradients, denominators, metrics.

Data parallelism: every rank has the whole student and the critics, and sees its own groups of the
update's rows. All rollouts of a draw stay on one rank, so that a baseline over a group needs no
communication. Counts by which one rank would divide are summed over the ranks first, so an update is
the same however its groups are dealt out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """The ranks of one update; without a process group, this process only.

    Every rank must call the same methods in the same order, or all of them wait. Every rank has at least
    one group of rollouts.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @property
    def alone(self) -> bool:
        return self._group is None

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks; ``value`` itself may serve as the buffer."""
        if self._group is not None:
            dist.all_reduce(value, group=self._group)
        return value

    def sum_count(self, count: int, device: torch.device | str = "cpu") -> int:
        """The sum over all ranks. ``device``: one on which the group can sum (NCCL sums only on its GPU)."""
        if self._group is None:
            return count
        return int(self.sum(torch.tensor(count, device=device)))

    def max_count(self, count: int, device: torch.device | str = "cpu") -> int:
        """The maximum over all ranks, as :meth:`sum_count`."""
        if self._group is None:
            return count
        value = torch.tensor(count, device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)

    def sum_by_name(self, values: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """The sums of scalars by name; a rank that lacks a name adds 0."""
        if self._group is None:
            return dict(values)
        names: list[list[str]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(names, list(values), group=self._group)
        together = sorted({name for of_rank in names for name in of_rank})
        if not together:
            return {}
        zero = torch.zeros((), dtype=torch.float64, device=device)
        stacked = self.sum(torch.stack([values.get(name, zero).detach().double() for name in together]))
        return dict(zip(together, stacked, strict=True))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients in place, in one message; a parameter without gradient on any rank keeps none."""
        if self._group is None:
            return
        parameters = list(parameters)
        device = parameters[0].device
        has = self.sum(
            torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64, device=device)
        )
        moved = [parameter for parameter, count in zip(parameters, has.tolist(), strict=True) if count]
        if not moved:
            return
        for parameter in moved:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = self.sum(torch.cat([p.grad.flatten() for p in moved if p.grad is not None]))
        for parameter, part in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
            parameter.grad = part.view_as(parameter)


ALONE = Ranks()
"""The ranks of an update in one process."""
