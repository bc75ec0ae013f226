"""The student: a Hugging Face causal LM whose states and head are used separately.

The full vocabulary is never formed for a whole batch: :meth:`Student.states` gives the
final-norm hidden states before response tokens, and :mod:`learner.model.head` forms logits
from them in chunks. Master weights are float32; the forward pass computes in ``precision``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distill.machine.hardware import ONE_LOAD_AT_A_TIME, computes_in_bfloat16
from distill.machine.vector_math import settle_vector_math
from learner.batch import Pack
from learner.model.attention import PACKED
from learner.model.head import LogitTransform


def resolve_device(name: str) -> torch.device:
    """``auto``: the GPU when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the processor computes in it, since elsewhere it is emulated
    (on an AVX2 processor twenty times slower than float32)."""
    if name == "auto":
        fast = device.type == "cuda" or computes_in_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, name)


def _set_matmul_precision(device: torch.device, precision: torch.dtype) -> None:
    """On a GPU, float32 products beside a bf16 backbone (heads, critics) are made of TF32 numbers.

    They hold three bits more than bf16 and are summed in float32, at several times float32's speed. A
    teacher's states are bf16, as its head is in most checkpoints: products of the two lose nothing.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == torch.float32 else "high")


def _attention_of(config: Any) -> str:
    """Softcapped attention (Gemma 2) is in transformers' eager form alone."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else PACKED


_PREFIX = "student."
"""Of the student's tensors in a checkpoint."""


class Student:
    """A causal LM in training."""

    def __init__(self, folder: str | Path, *, precision: str = "auto", device: str = "auto") -> None:
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        _set_matmul_precision(self.device, self.precision)
        self.folder = Path(folder)
        settle_vector_math()
        attention = _attention_of(AutoConfig.from_pretrained(folder, local_files_only=True))
        with ONE_LOAD_AT_A_TIME:
            # The library's types do not say what a causal LM can do.
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
            )
        # Dropout off: the objective is a function of the policy, not of a noisy copy of it.
        self.model: Any = model.to(self.device).eval()
        self.transform = LogitTransform.from_config(self.model.config)

    @property
    def head_weight(self) -> nn.Parameter:
        return self.model.get_output_embeddings().weight

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Each once; a tied head counts as the embedding it is."""
        return self.model.parameters()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and tensors, tied ones once: what a push carries."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the student, by flat names."""
        return {f"{_PREFIX}{name}": tensor for name, tensor in self.named_weights()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`; other names are left alone."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"{_PREFIX}{name}"])

    def states(self, pack: Pack) -> Tensor:
        """[N, D]: final-norm hidden states before the pack's response tokens.

        The sequences of a pack see only themselves: by their lengths (:mod:`learner.model.attention`),
        and in eager attention by the mask that transformers builds from where positions restart.
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
        """An ordinary Hugging Face checkpoint with its tokenizer, in float32."""
        self.model.save_pretrained(folder)
        if (self.folder / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(self.folder, local_files_only=True).save_pretrained(folder)
