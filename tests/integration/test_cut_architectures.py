"""A student cut from Qwen2 (grouped and untied heads) or Gemma 2 (sliding windows, soft-caps) is one model
everywhere: transformers and vLLM load it and agree on its log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distill.config import RolloutConfig
from distill.interfaces import SampleRequest
from learner.model.cut import cut_student
from learner.model.depth import block_influence, most_influential
from tests.integration.engines import TOLERANCE, EngineHost
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SIZES = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
PROMPTS = [[5, 6, 7], list(range(20, 60)), [9]]


def qwen2() -> Any:
    # Its heads have 16 features unless head_dim says otherwise, and the CPU's kernel needs 32.
    return Qwen2ForCausalLM(Qwen2Config(**SIZES | {"hidden_size": 128}, tie_word_embeddings=False))


def gemma2() -> Any:
    return Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=16,
            final_logit_softcapping=10.0,
            attn_logit_softcapping=None,
        )
    )


@pytest.mark.parametrize("make", [qwen2, gemma2])
def test_cut_student_is_the_same_model_in_both_libraries(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    teacher = tmp_path / "teacher"
    model.save_pretrained(teacher)
    tiny_tokenizer().save_pretrained(teacher)
    influence = block_influence(teacher, PROMPTS, device=torch.device("cpu"), precision=torch.float32)
    kept = most_influential(influence, 3)
    student = cut_student(teacher, tmp_path / "student", kept)
    kinds = json.loads((student / "config.json").read_text())["layer_types"]
    assert kinds == [model.config.layer_types[layer] for layer in kept]

    settings = RolloutConfig(dtype="float32", kv_cache_gib=0.25)
    host = EngineHost(
        "actors.vllm_engine.generator.VllmGenerator",
        str(student),
        settings,
        max_model_tokens=128,
        stop_token_ids=(1,),
        on_push="recompute",
        lock_step=True,
    )
    try:
        requests = [
            SampleRequest(prompt_tokens=prompt, max_new_tokens=40, seed=i) for i, prompt in enumerate(PROMPTS)
        ]
        completions = host.call("generate", requests)
    finally:
        host.close()
    plain = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="eager")
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        response = completion.response_tokens
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=TOLERANCE)
