"""The choice of a student's layers, against the plain formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from learner.model.depth import block_influence, even_layers, most_influential
from learner.process.cut import ranges

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 5,
}
TEXTS = [[1, 2, 3, 4], [5, 6], [7]]


@pytest.mark.parametrize(
    ("teacher_layers", "layers", "kept"),
    [
        (30, 10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]),
        (7, 3, [0, 3, 6]),
        (7, 7, [0, 1, 2, 3, 4, 5, 6]),
        (7, 2, [0, 6]),
        (7, 1, [0]),
    ],
)
def test_layers_are_evenly_spaced(teacher_layers, layers, kept):
    assert even_layers(teacher_layers, layers) == kept


@given(st.lists(st.floats(0, 2), min_size=1, max_size=40), st.data())
def test_the_ends_and_the_most_influential_are_kept(influence, data):
    number = data.draw(st.integers(1, len(influence)))
    kept = most_influential(influence, number)
    assert kept == sorted(set(kept)) and len(kept) == number
    assert kept[0] == 0
    if number > 1:
        assert kept[-1] == len(influence) - 1
    removed = [influence[i] for i in range(len(influence)) if i not in kept]
    assert (
        not removed or number < 3 or max(removed[:]) <= min(influence[i] for i in kept[1:-1]) or number == 1
    )


@given(st.integers(2, 40), st.data())
def test_evenly_spaced_layers_are_distinct(teacher_layers, data):
    number = data.draw(st.integers(2, teacher_layers))
    kept = even_layers(teacher_layers, number)
    assert len(set(kept)) == number
    assert (kept[0], kept[-1]) == (0, teacher_layers - 1)


@pytest.mark.parametrize(
    "model",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=2)),
    ],
    ids=["llama", "gemma2"],
)
def test_block_influence_is_one_minus_the_mean_cosine(model, tmp_path):
    torch.manual_seed(0)
    model().save_pretrained(tmp_path)
    found = block_influence(tmp_path, TEXTS, device=torch.device("cpu"), precision=torch.float32)

    # The states of transformers' own `output_hidden_states`: the last one is taken after the final norm,
    # so that the last layer's output is read from the stack without it.
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    reference.model.norm = torch.nn.Identity()
    turned = [[] for _ in range(5)]
    for text in TEXTS:
        states = reference.model(torch.tensor([text]), output_hidden_states=True).hidden_states
        for layer in range(5):
            for before, after in zip(states[layer][0], states[layer + 1][0], strict=True):
                cosine = before @ after / (before.norm() * after.norm())
                turned[layer].append(1 - cosine.item())
    expected = [sum(values) / len(values) for values in turned]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_layer_that_does_nothing_goes_first(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    influence = block_influence(tmp_path, TEXTS, device=torch.device("cpu"), precision=torch.float32)
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert most_influential(influence, 4) == [0, 1, 3, 4]


def test_numbers_in_short():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([3]) == "3"
