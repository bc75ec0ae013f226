"""A random Llama of two layers with a byte-level tokenizer, and prompts for it.

Small enough that starting engines is what takes the time; head size 32 since the CPU's
attention kernel has none of 16.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.config import RunConfig
from distill.config.load import load_config

STOP = "</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and two special tokens: 258 ids, <s> 0 and </s> 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", STOP, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=STOP)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    vocab_size: int = 258,
    hidden_size: int = 64,
    tied: bool = True,
) -> Path:
    """An ordinary checkpoint with its tokenizer. Weights large enough for a peaked policy."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, num_rows: int = 24) -> Path:
    """Prompts of different lengths, and completions, as JSONL."""
    rows = [
        {"prompt": "say " + "so " * (i % 4) + str(i), "completion": f"it is {i * 7 % 13}"}
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_overrides(folder: Path) -> list[str]:
    """Settings of a run of two updates on the models and rows below ``folder``."""
    return [
        f"run_dir={folder}/run",
        f"teacher.model={folder}/teacher",
        "student.init.from=teacher",
        "student.init.num_layers=1",
        f"data.path={folder}/rows.jsonl",
        "data.num_heldout=8",
        "data.max_prompt_tokens=64",
        "data.max_reference_tokens=32",
        "sft.num_updates=2",
        "sft.rows_per_update=4",
        "corpus.num_prompts=12",
        "corpus.max_new_tokens=8",
        "rollout.max_new_tokens=8",
        # One number format on every processor: `auto` is bfloat16 where it is computed in, and
        # then engine and learner differ by 1e-3 nats rather than 1e-5.
        "rollout.dtype=float32",
        "scoring.dtype=float32",
        "rollout.kv_cache_gib=0.1",
        "rollout.max_num_seqs=16",
        "scoring.kv_cache_gib=0.1",
        "learner.num_updates=2",
        "learner.prompts_per_update=4",
        "learner.teacher_rows_per_update=4",
        "learner.precision=float32",
        "learner.micro_batch_tokens=128",
        "learner.vocabulary_chunk=16",
        "evaluation.num_prompts=4",
        "evaluation.num_prompts_during=2",
        "evaluation.every=1",
        "checkpoint.every=1",
    ]


def make_world(folder: Path) -> Path:
    """Teacher and rows under ``folder``, and a config file; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_llama(folder / "teacher")
    write_rows(folder / "rows.jsonl")
    config = folder / "tiny.yaml"
    config.write_text("recipe: ammd\n")
    return config


def tiny_config(folder: Path, *overrides: str) -> RunConfig:
    """The configuration of :func:`tiny_overrides` with more on top."""
    from deploy import PRESETS

    return load_config(folder / "tiny.yaml", [*tiny_overrides(folder), *overrides], PRESETS)
