"""Chunked full-vocabulary work is the unchunked one; heads are what the models compute."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import ConfigError
from learner.model import chunked
from learner.model.chunked import ChunkedLogits, chunked_blocks, chunked_loss
from learner.model.head import Head, LogitTransform

N, D, V = 11, 5, 13


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, weights = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, D), (V, D), (V,), (N, V))
    )
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), weights


TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(scale=0.3),
    "softcap": LogitTransform(softcap=2.0),
    "all": LogitTransform(scale=1.5, softcap=3.0, bias=problem()[2]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("chunk", [1, 2, 4, 10, 11, 100])
@pytest.mark.parametrize(("block_rows", "boundary"), [(1, 0), (3, 7), (100, 4)])
def test_chunked_is_unchunked(monkeypatch, transform, chunk, block_rows, boundary):
    monkeypatch.setattr(chunked, "_BLOCK_BYTES", block_rows * 4 * V)
    hidden, weight, _, weights = problem()
    extra = torch.tensor(0.7, requires_grad=True)
    inputs = [hidden, weight, extra] + ([] if transform.bias is None else [transform.bias])

    def loss_of(where: slice, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert not where.start < boundary < where.stop
        logprobs = (extra * logits).log_softmax(-1)
        return (weights[where] * logprobs).sum() / (N * V), {"sum": logprobs.exp()[:, 0].sum() / N}

    loss, metrics = chunked_loss(
        hidden, weight, transform, loss_of, chunk, parameters=[extra], boundary=boundary
    )
    grads = torch.autograd.grad(3 * loss, inputs)
    boundary = 0
    plain, plain_metrics = loss_of(slice(0, N), transform(hidden @ weight.T))
    expected = torch.autograd.grad(3 * plain, inputs)
    torch.testing.assert_close(loss, plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(metrics["sum"], plain_metrics["sum"].detach(), atol=1e-6, rtol=1e-6)
    assert not metrics["sum"].requires_grad
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-6, rtol=1e-6)


def square(where: slice, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return logits.square().sum(), {}


def test_a_vocabulary_prefix_leaves_the_tail_alone():
    hidden, weight, bias, _ = problem()
    transform = LogitTransform(bias=bias)
    loss, _ = chunked_loss(hidden, weight, transform, square, 4, num_tokens=9)
    loss.backward()
    expected = (hidden.detach() @ weight.detach()[:9].T + bias.detach()[:9]).square().sum()
    torch.testing.assert_close(loss.detach(), expected)
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad[:9].any(dim=1).all() and not weight.grad[9:].any()
    assert bias.grad[:9].all() and not bias.grad[9:].any()


def test_without_gradients_and_without_positions():
    hidden, weight, _, _ = problem()
    with torch.no_grad():
        loss, _ = chunked_loss(hidden, weight, LogitTransform(), square, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, (hidden @ weight.T).detach().square().sum())
    loss, metrics = chunked_loss(hidden[:0], weight, LogitTransform(), square, 4)
    loss.backward()
    assert loss == 0 and metrics == {} and not weight.grad.any()


def test_frozen_inputs_and_constant_losses():
    hidden, weight, _, _ = problem()
    loss, _ = chunked_loss(hidden, weight.detach(), LogitTransform(), square, 4)
    (grad,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(grad, 2 * (hidden @ weight.T @ weight).detach())
    loss, _ = chunked_loss(hidden, weight, LogitTransform(), lambda where, x: (torch.ones(()), {}), 4)
    assert loss == 3
    assert not torch.autograd.grad(loss, weight)[0].any()


def test_backward_twice_is_refused():
    hidden, weight, _, _ = problem()
    loss, _ = chunked_loss(hidden, weight, LogitTransform(), square, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backpropagated only once"):
        loss.backward()


def test_bfloat16_states_keep_a_float32_head_gradient():
    hidden, weight, _, _ = problem()
    states = hidden.detach().bfloat16().requires_grad_()

    def loss_of(where: slice, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert logits.dtype == torch.float32
        return logits.log_softmax(-1)[:, 0].sum(), {}

    loss, _ = chunked_loss(states, weight, LogitTransform(), loss_of, 4)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32 and states.grad.dtype == torch.bfloat16
    plain = (hidden @ weight.T).log_softmax(-1)[:, 0].sum()
    (expected,) = torch.autograd.grad(plain, weight)
    torch.testing.assert_close(weight.grad, expected, atol=0.1, rtol=0.1)


def test_chunked_logits():
    hidden, weight, _, _ = problem()
    head = Head(weight.detach(), LogitTransform(softcap=2.0))
    logits = ChunkedLogits(head, hidden, 4)
    for where in chunked_blocks(N, V, 4, torch.device("cpu")):
        torch.testing.assert_close(logits(where), head.logits(hidden.detach())[where])
    with pytest.raises(ValueError, match="straddle"):
        logits(slice(3, 5))


CONFIGS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 0.05, "head_dim": 8},
    "cohere": {"logit_scale": 0.25, "pad_token_id": 0, "eos_token_id": 1},
    "granite": {"logits_scaling": 3.0},
    "phi": {},
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_heads_are_what_the_models_compute(tmp_path, model_type):
    """A tiny model of each kind, saved, its head read back alone."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(sizes | CONFIGS[model_type]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    head = Head.from_checkpoint(tmp_path)
    torch.testing.assert_close(head.logits(output.hidden_states[-1][0]), output.logits[0])
    assert LogitTransform.from_config(model.config).scale == head.transform.scale


def write_checkpoint(folder, tensors: dict[str, Tensor], **config) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def test_an_unknown_architecture_is_refused(tmp_path):
    write_checkpoint(tmp_path, {"lm_head.weight": torch.ones(2, 2)}, model_type="surprise")
    with pytest.raises(
        ConfigError,
        match=r"^model_type=surprise must be one of .*, whose logits are known .*; choose another model",
    ) as error:
        Head.from_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    write_checkpoint(tmp_path, {"other": torch.ones(2, 2)}, model_type="llama")
    with pytest.raises(ConfigError, match="must contain lm_head"):
        Head.from_checkpoint(tmp_path)


def test_a_tied_config_wins_over_a_head_in_the_file(tmp_path):
    tensors = {"lm_head.weight": torch.zeros(2, 2), "model.embed_tokens.weight": torch.ones(2, 2)}
    write_checkpoint(tmp_path, tensors, model_type="llama", tie_word_embeddings=True)
    assert Head.from_checkpoint(tmp_path).weight.all()
    write_checkpoint(tmp_path, tensors, model_type="llama", tie_word_embeddings=False)
    assert not Head.from_checkpoint(tmp_path).weight.any()


def test_prefix_and_norms():
    _, weight, bias, _ = problem()
    head = Head(weight.detach(), LogitTransform(bias=bias.detach())).prefix(4)
    assert head.num_tokens == 4 and head.transform.bias.shape == (4,)
    expected = [math.sqrt(sum(x * x for x in row)) for row in weight[:4].tolist()]
    torch.testing.assert_close(head.row_norms, torch.tensor(expected))
