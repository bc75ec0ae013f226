"""Which tensor of an update is the first that is not finite.

An update has three parts, and each is watched in the way that gives its tensors names:

- the student's backbone by hooks of its modules: outputs in the order of the forward pass, and their gradients, and
  those of the parameters, in the order of the backward pass;
- everything else (logits, critics, credit, losses and the gradients that are formed with them) operation by operation
  (:class:`torch.utils._python_dispatch.TorchDispatchMode`), named by the function that computes it. A backbone has
  infinities of its own (masks), so its operations are left out;
- the backward pass through the backbone by the hooks alone, for the same reason.

Used by :mod:`learner.process.replay_update`, on an update that is known to fail.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.batch import Pack, TokenBatch
from learner.distiller import Distiller

_UNWRITTEN = ("empty", "new_empty", "resize")
"""Operations whose result has no values yet."""
_CALLS_BACKWARD = ("student_step", "_critic_gradient")
"""Functions whose ``backward()`` the hooks watch."""


def not_finite(what: str, tensor: Tensor, place: str = "") -> str | None:
    """In words, the first element of a tensor that is not finite; None if all are. ``place``: where in the batch."""
    values = tensor.detach()
    if not values.is_floating_point():
        return None
    wrong = (~values.isfinite()).nonzero()
    if not len(wrong):
        return None
    index = wrong[0].tolist()
    shape = "x".join(map(str, values.shape)) or "scalar"
    at = f" at {index}" if index else ""
    where = f" ({place})" if place else ""
    return f"{what}, shape {shape}: {values[tuple(index)].item()}{at}{where}, {len(wrong)} of {values.numel()} elements"


class Rows:
    """Names of the places in a batch."""

    def __init__(self, trajectories: Sequence[str]) -> None:
        self._trajectories = trajectories

    def of_response(self, pack: Pack, number: int) -> str:
        """The place of a response token of a pack."""
        return f"{self._trajectories[int(pack.row[number])]}, response token {int(pack.step[number])}"

    def of_input(self, pack: Pack, number: int) -> str:
        """The place of an input of a pack."""
        start = 0
        for length in pack.sequence_lengths:
            if number < start + length:
                break
            start += length
        (inside,) = ((pack.state_index >= start) & (pack.state_index < start + length)).nonzero(as_tuple=True)
        first = inside[0]
        token = number - int(pack.state_index[first]) - 1
        text = f"prompt token {number - start}" if token < 0 else f"response token {token}"
        return f"{self._trajectories[int(pack.row[first])]}, {text}"


def in_inputs(batch: TokenBatch, rows: Rows) -> Iterator[str]:
    """The tensors of a batch that have counted positions which are not finite."""
    for pack in batch.packs:
        for name in ("behavior_logprobs", "teacher_hidden"):
            values: Tensor | None = getattr(pack, name)
            if values is None:
                continue
            counted = pack.counted if values.dim() == 1 else pack.counted[:, None]
            wrong = (~values.isfinite() & counted).nonzero()
            if len(wrong):
                kept = values.masked_fill(~counted, 0)
                yield not_finite(name, kept, rows.of_response(pack, int(wrong[0, 0]))) or ""


def in_weights(distiller: Distiller) -> Iterator[str]:
    """The weights that are not finite."""
    named = dict(distiller.student.tensors()) | {"the teacher's head": distiller.teacher.weight}
    if distiller.critics is not None:
        named |= distiller.critics.state_dict()
    for name, tensor in named.items():
        if (found := not_finite(name, tensor)) is not None:
            yield found


class TensorWatch(TorchDispatchMode):
    """Notes the first tensor of an update that is not finite. Enter it with :meth:`watching`."""

    def __init__(self, distiller: Distiller, batch: TokenBatch, rows: Rows) -> None:
        super().__init__()
        self._distiller = distiller
        self._batch = batch
        self._rows = rows
        self._pack: Pack | None = None
        """The one that the backbone computes now."""
        self.first: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        model: nn.Module = self._distiller.student.model
        decoder: nn.Module = self._distiller.student.model.get_decoder()
        hooks = [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            *(
                each.register_forward_hook(self._output(name or "model"))
                for name, each in model.named_modules()
            ),
            decoder.register_forward_hook(self._leave),
        ]
        named = list(model.named_parameters())
        if self._distiller.critics is not None:
            named += self._distiller.critics.named_parameters()
        hooks += [
            each.register_hook(self._gradient(f"the gradient of {name}"))
            for name, each in named
            if each.requires_grad
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, what: str, tensor: Tensor, pack: Pack | None = None) -> None:
        if self.first is not None:
            return
        place = ""
        if pack is not None and tensor.dim() > 1 and tensor.shape[1] == len(pack.input_ids):
            wrong = (~tensor.detach().isfinite()).nonzero()
            place = self._rows.of_input(pack, int(wrong[0, 1])) if len(wrong) else ""
        self.first = not_finite(what, tensor, place)

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        start = kwargs["input_ids"].data_ptr()
        self._pack = next(pack for pack in self._batch.packs if pack.input_ids.data_ptr() == start)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._pack = None

    def _output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            pack = self._pack
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self._note(f"the output of {name}", tensor, pack)
                    if tensor.requires_grad:
                        tensor.register_hook(self._gradient(f"the gradient of the output of {name}", pack))

        return hook

    def _gradient(self, what: str, pack: Pack | None = None) -> Callable[[Tensor], None]:
        return lambda grad: self._note(what, grad, pack)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.first is None and self._pack is None and not func.is_view:
            name = func.overloadpacket.__name__
            if not name.startswith(_UNWRITTEN):
                self._note_operation(name.strip("_"), result)
        return result

    def _note_operation(self, name: str, result: Any) -> None:
        wrong = [
            tensor
            for tensor in tree_leaves(result)
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not _all_finite(tensor)
        ]
        frame = _caller(inspect.currentframe()) if wrong else None
        if frame is None:
            return
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and frame.f_code.co_name in _CALLS_BACKWARD:
            return
        place = f"{frame.f_globals['__name__']}, line {frame.f_lineno}"
        self._note(f"the result of {name} in {frame.f_code.co_qualname} ({place})", wrong[0])


def _all_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _caller(frame: FrameType | None) -> FrameType | None:
    """The innermost function of the method that is running."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("learner.", "distill.")) and module != __name__:
            return frame
        frame = frame.f_back
    return None
