"""A student cut from a tiny random teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distill.errors import ConfigError
from learner.model import cut
from learner.model.cut import cut_student

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def teacher(request, tmp_path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=7, tie_word_embeddings=request.param)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    return save(model, tmp_path / "teacher")


def logits(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        return model(torch.tensor([[0, 1, 2, 3]])).logits


def test_the_student_is_the_teacher_without_the_other_layers(teacher, tmp_path):
    student = cut_student(teacher, tmp_path / "student", [0, 3, 6])
    config = json.loads((student / "config.json").read_text())
    assert (config["num_hidden_layers"], config["distill_kept_layers"]) == (3, [0, 3, 6])
    pruned = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    pruned.model.layers = torch.nn.ModuleList(pruned.model.layers[i] for i in (0, 3, 6))
    pruned.config.num_hidden_layers = 3
    with torch.no_grad():
        expected = pruned(torch.tensor([[0, 1, 2, 3]]), use_cache=False).logits
    assert torch.equal(logits(student), expected)
    assert not torch.equal(logits(student), logits(teacher))


def test_all_layers_are_the_teacher(teacher, tmp_path):
    assert torch.equal(logits(cut_student(teacher, tmp_path / "student", range(7))), logits(teacher))


def test_the_tokenizer_comes_along_and_nothing_else_is_left(teacher, tmp_path):
    student = cut_student(teacher, tmp_path / "new" / "student", [0, 6])
    assert AutoTokenizer.from_pretrained(student).get_vocab() == {"a": 0, "b": 1, "<unk>": 2}
    assert [child.name for child in student.parent.iterdir()] == ["student"]


def test_settings_per_layer_go_with_their_layers(tmp_path):
    kinds = [
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
    ]
    config = Qwen2Config(
        **SIZES, num_hidden_layers=5, layer_types=kinds, use_sliding_window=True, sliding_window=8
    )
    teacher = save(Qwen2ForCausalLM(config).to(torch.bfloat16), tmp_path / "teacher")
    student = cut_student(teacher, tmp_path / "student", [0, 2, 4])
    assert json.loads((student / "config.json").read_text())["layer_types"] == [kinds[i] for i in (0, 2, 4)]
    logits(student)


@pytest.mark.parametrize("layers", [[], [0, 7], [-1, 3]])
def test_layers_that_the_teacher_lacks(teacher, tmp_path, layers):
    with pytest.raises(
        ConfigError, match=r"^student\.init\.layers=.* must be in \[0, 6\], the teacher's layers"
    ):
        cut_student(teacher, tmp_path / "student", layers)
    assert not (tmp_path / "student").exists()


def test_another_kind_of_model_is_refused(tmp_path):
    teacher = save(
        GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)), tmp_path / "teacher"
    )
    with pytest.raises(
        ConfigError,
        match=r"^student\.init\.from=teacher must have a teacher whose layers are in model\.layers, .*, not a GPT2LMHeadModel; set student\.model",
    ):
        cut_student(teacher, tmp_path / "student", [0])


def test_an_existing_student_is_kept_or_refused(teacher, tmp_path):
    student = cut_student(teacher, tmp_path / "student", [0, 3, 6])
    written = (student / "model.safetensors").stat().st_mtime_ns
    assert cut_student(teacher, student, [0, 3, 6]) == student
    assert (student / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(
        ConfigError, match=rf"^{student} must be absent or the student cut to layers 0, 6; move it away$"
    ):
        cut_student(teacher, student, [0, 6])


def test_a_cut_that_fails_leaves_nothing(teacher, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        cut_student(teacher, tmp_path / "out" / "student", [0, 3, 6])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("others_layers", [[0, 3, 6], [0, 6]])
def test_a_student_that_appears_meanwhile_is_kept_or_refused(teacher, tmp_path, monkeypatch, others_layers):
    other, student = cut_student(teacher, tmp_path / "other", others_layers), tmp_path / "student"
    new_folder = cut.new_folder

    def overtaken(path, **settings):
        other.rename(path)
        return new_folder(path, **settings)

    monkeypatch.setattr(cut, "new_folder", overtaken)
    if len(others_layers) == 3:
        assert cut_student(teacher, student, [0, 3, 6]) == student
    else:
        with pytest.raises(ConfigError, match=r"must be absent or the student cut to layers 0, 3, 6"):
            cut_student(teacher, student, [0, 3, 6])
    config = json.loads((student / "config.json").read_text())
    assert config["num_hidden_layers"] == len(others_layers)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["student", "teacher"]
