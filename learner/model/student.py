"""The student: a Hugging Face causal LM whose states and head are used separately.

Full-vocabulary rows never exist for a whole batch: :meth:`Student.states` returns the final-norm hidden
states before response tokens, and :mod:`learner.model.chunked` forms logits from them in chunks.
Master weights are float32; the forward pass computes in ``precision``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill.machine.hardware import ONE_LOAD_AT_A_TIME, resolve_dtype
from distill.machine.vector_math import settle_vector_math
from learner.batch import Pack
from learner.model.attention import PACKED
from learner.model.head import LogitTransform

Precision = Literal["auto", "float32", "bfloat16"]


def resolve_device(name: str) -> torch.device:
    """The device of a setting; ``auto`` is the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The compute format of a setting; ``auto`` is bfloat16 where it is not emulated."""
    return getattr(torch, resolve_dtype(name, "cuda" if device.type == "cuda" else "cpu"))


def _set_matmul_precision(device: torch.device, precision: torch.dtype) -> None:
    """Compute float32 products (heads, critics) with TF32 on a GPU if the backbone is bf16.

    TF32 has three bits more than bf16, sums in float32, and is several times faster than float32. The
    teacher's states are bf16, and so is its head in most checkpoints: their products lose nothing.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == torch.float32 else "high")


def _attention_of(config: Any) -> str:
    """The attention implementation: only transformers' eager one has Gemma 2's softcap."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else PACKED


_PREFIX = "student."
"""Prefix of the student's tensors in a checkpoint."""


class Student:
    """A causal LM in training."""

    def __init__(
        self,
        folder: str | Path,
        *,
        precision: Precision = "auto",
        device: str = "auto",
        random: bool = False,
    ) -> None:
        """``random``: with random weights, for :meth:`load_tensors`; ``folder`` then needs only ``config.json``."""
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        _set_matmul_precision(self.device, self.precision)
        settle_vector_math()
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        attention = _attention_of(config)
        with ONE_LOAD_AT_A_TIME:
            # The library's types do not describe a causal LM's methods.
            model: Any
            if random:
                model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, attn_implementation=attention
                )
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
                )
        # Dropout off: the objective is a function of the policy, not of a noisy copy of it.
        self.model: Any = model.to(self.device).eval()
        # Phi's head has a bias. It is a parameter like any other: optimizer steps change it in place.
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        self.transform = LogitTransform.from_config(self.model.config, bias)

    @property
    def head_weight(self) -> nn.Parameter:
        return self.model.get_output_embeddings().weight

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter once; a tied head is the embedding."""
        return self.model.parameters()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The names and tensors of a push: those of a checkpoint, tied ones once."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def tensors(self) -> dict[str, Tensor]:
        """The student's part of a checkpoint, by flat names."""
        return {f"{_PREFIX}{name}": tensor for name, tensor in self.named_weights()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`; other names are ignored."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"{_PREFIX}{name}"])

    def copy_from(self, other: Student) -> None:
        """Take the weights of another student of the same architecture."""
        with torch.no_grad():
            for mine, its in zip(self.parameters(), other.parameters(), strict=True):
                mine.copy_(its)

    def states(self, pack: Pack) -> Tensor:
        """[N, D]: final-norm hidden states before the pack's response tokens.

        The sequences of a pack do not see each other: their lengths separate them in
        :mod:`learner.model.attention`, and in eager attention the mask that transformers builds from the
        positions at which counting restarts.
        """
        autocast = (
            torch.autocast(self.device.type, self.precision)
            if self.precision != torch.float32
            else nullcontext()
        )
        with autocast:
            output = self.model.get_decoder()(
                input_ids=pack.input_ids[None],
                position_ids=pack.position_ids[None],
                use_cache=False,
                sequence_lengths=pack.sequence_lengths,
            )
        return output.last_hidden_state[0].index_select(0, pack.state_index)

    def save(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face checkpoint without tokenizer, in float32."""
        self.model.save_pretrained(folder)
