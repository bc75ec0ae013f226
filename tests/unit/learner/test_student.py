"""The student's states and head against the model as transformers runs it, one row at a time.

Every architecture that :mod:`learner.model.head` claims to know is built small and compared: a
pack must change nothing, and head and transform must give the model's own logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deploy.run.model_facts import ModelFacts
from distill.objectives import cross_entropy
from distill.schema import Trajectory, trajectory_batch
from learner.batch import TokenBatch, token_batch
from learner.model.chunked import chunked_loss
from learner.model.head import Head, known_architectures
from learner.model.student import Student
from learner.update.positions import Heads

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "sliding_window": 5,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
OWN: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 12},
    "gemma3_text": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 12},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "granitemoe": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
}
ROWS = ((9, 4), (3, 11), (1, 1), (6, 2))
"""Prompt and response tokens."""


def _checkpoint(folder: Path, model_type: str) -> Path:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**(SMALL | OWN.get(model_type, {})))
    model: Any = AutoModelForCausalLM.from_config(config)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)  # it starts at 0, where a head without it would look the same
    model.save_pretrained(folder)
    return folder


def _packed(micro_batch_tokens: int) -> TokenBatch:
    generator = np.random.default_rng(0)
    rows = [
        Trajectory(
            draw_id=f"text-{number}",
            source="reference",
            prompt_index=number,
            sample_index=0,
            prompt_tokens=generator.integers(2, 97, prompt),
            response_tokens=generator.integers(2, 97, response),
            finish_reason="stop",
        )
        for number, (prompt, response) in enumerate(ROWS)
    ]
    return token_batch([trajectory_batch([row]) for row in rows], micro_batch_tokens)


@pytest.mark.parametrize("model_type", [name for name in known_architectures() if name != "phi"])
def test_packed_states_and_head_give_the_models_logits(tmp_path: Path, model_type: str) -> None:
    folder = _checkpoint(tmp_path, model_type)
    student = Student(folder, precision="float32")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    head = Head(student.head_weight.detach(), student.transform.detach())
    batch = _packed(64)
    assert len(batch.packs) == 1  # one pack of four sequences
    pack = batch.packs[0]
    got = head.logits(student.states(pack).detach())
    first = 0
    for length in pack.sequence_lengths:
        inside = (pack.state_index >= first) & (pack.state_index < first + length)
        with torch.no_grad():
            logits = plain(pack.input_ids[None, first : first + length]).logits[0]
        expected = logits[pack.state_index[inside] - first]
        assert expected.std() > 0.05
        torch.testing.assert_close(got[inside], expected, rtol=1e-4, atol=1e-4)
        first += length


def test_a_heads_bias_is_trained_and_pushed(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, "phi")
    student = Student(folder, precision="float32")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for pack in _packed(1).packs:  # one sequence each

        def loss_of_chunk(where: slice, logits: torch.Tensor, targets: torch.Tensor = pack.targets):
            return cross_entropy(logits.log_softmax(-1), targets[where]).sum(), {}

        states = student.states(pack)
        chunked_loss(states, student.head_weight, student.transform, loss_of_chunk, 3)[0].backward()
        logits = plain(pack.input_ids[None]).logits[0, pack.state_index]
        torch.nn.functional.cross_entropy(logits, pack.targets, reduction="sum").backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert expected["lm_head.bias"].abs().max() > 0.1
    for name, parameter in student.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    assert "lm_head.bias" in dict(student.named_weights())
    assert (
        Heads.of(student, Head.from_checkpoint(folder)).student.transform.bias is not student.transform.bias
    )


@pytest.mark.parametrize("model_type", known_architectures())
def test_the_preflight_can_read_every_architecture(tmp_path: Path, model_type: str) -> None:
    facts = ModelFacts.read(_checkpoint(tmp_path, model_type), "teacher.model", "save it again")
    assert (facts.model_type, facts.vocab_size, facts.hidden_size) == (model_type, 97, 48)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_packing_does_not_change_the_gradient(tmp_path: Path, model_type: str) -> None:
    folder = _checkpoint(tmp_path, model_type)
    gradients = []
    for micro_batch_tokens in (64, 1):
        student = Student(folder, precision="float32")
        for pack in _packed(micro_batch_tokens).packs:
            student.states(pack).square().sum().backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    for packed, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_a_saved_student_names_no_attention_of_ours(tmp_path: Path) -> None:
    student = Student(_checkpoint(tmp_path / "in", "llama"), precision="float32")
    student.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [name for name in config if "attn_implementation" in name]
