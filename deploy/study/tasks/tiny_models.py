"""Makes models so small that a run of 1,500 updates takes minutes: a tokenizer and Llamas trained on text.

The tasks that make their own models share this code (tiny_wiki.py, tiny_translation.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.files import new_folder, write_bytes

STOP = "</s>"


@dataclass(frozen=True)
class TinyModel:
    """The size of a Llama, and how it is trained."""

    num_layers: int
    hidden_size: int
    num_updates: int
    rows_per_update: int = 32
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class TrainingText:
    """A text to train on, as token ids; the loss is on the response."""

    prompt: list[int]
    response: list[int]
    ends: bool
    """Whether the response ends with the stop token; otherwise it was cut."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[STOP], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP)


def are_made(models: Mapping[str, TinyModel], folder: Path) -> bool:
    """Whether a task's folder has all its models, which are the last parts to be made."""
    return all((folder / name).is_dir() for name in models)


def make_task(
    folder: Path,
    models: Mapping[str, TinyModel],
    tokenizer: Any,
    texts: Sequence[TrainingText],
    prompts: Sequence[tuple[str, str]],
    *,
    num_tuning: int,
    say: Callable[[str], None],
) -> None:
    """Write a task's prompts and train its models on ``texts``; parts that exist stay.

    ``prompts``: (prompt, completion) pairs, of which the first ``num_tuning`` are for tuning.
    """
    _write_prompts(folder / "tuning.jsonl", prompts[:num_tuning])
    _write_prompts(folder / "prompts.jsonl", prompts[num_tuning:])
    for name, model in models.items():
        _make_model(model, tokenizer, texts, folder / name, say)


def _write_prompts(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write (prompt, completion) pairs as JSONL, unless ``path`` exists."""
    if path.exists():
        return
    lines = [
        json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n"
        for prompt, completion in rows
    ]
    write_bytes(path, "".join(lines).encode())


def _make_model(
    model: TinyModel, tokenizer: Any, texts: Sequence[TrainingText], folder: Path, say: Callable[[str], None]
) -> None:
    """Train a model by cross-entropy and write its checkpoint, unless ``folder`` exists.

    The folder appears when it is complete.
    """
    if folder.is_dir():
        return
    with new_folder(folder, if_exists="keep") as unfinished:
        _random_model(model, tokenizer, unfinished)
        _train(model, texts, unfinished, lambda text: say(f"{folder.name}: {text}"))


def _random_model(model: TinyModel, tokenizer: Any, folder: Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    stop = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        intermediate_size=8 * model.hidden_size // 3,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.hidden_size // 32,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=stop,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    llama: Any = LlamaForCausalLM(config)
    llama.generation_config = GenerationConfig(bos_token_id=stop, eos_token_id=stop, pad_token_id=stop)
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(model: TinyModel, texts: Sequence[TrainingText], folder: Path, say: Callable[[str], None]) -> None:
    """Train with the learner's own supervised warm start."""
    from distill.config import SftConfig
    from distill.data import TextCorpus
    from distill.replay.draws import DrawOrder
    from learner.model.student import Student
    from learner.optimizer import adamw
    from learner.sft import run_sft

    student = Student(str(folder), precision="float32", device="cpu")
    corpus = TextCorpus(_as_rows(texts))

    def after_update(done: int, metrics: dict[str, float]) -> None:
        if done % 100 == 0:
            say(f"update {done}/{model.num_updates}, loss {metrics['sft/loss']:.3f}")

    run_sft(
        student,
        adamw(student.parameters(), beta1=0.9, beta2=0.95, weight_decay=0.1),
        corpus.row,
        DrawOrder("teacher_text", corpus.num_rows, 0),
        SftConfig(
            num_updates=model.num_updates,
            rows_per_update=model.rows_per_update,
            learning_rate=model.learning_rate,
        ),
        section="sft",
        first_update=0,
        micro_batch_tokens=4096,
        vocabulary_chunk=512,
        max_grad_norm=1.0,
        after_update=after_update,
    )
    student.save(folder)


def _as_rows(texts: Sequence[TrainingText]) -> Any:
    from distill.data import corpus_table
    from distill.schema import Trajectory

    return corpus_table(
        [
            Trajectory(
                draw_id=f"text-{number}",
                source="reference",
                prompt_index=number,
                sample_index=0,
                prompt_tokens=text.prompt,
                response_tokens=text.response,
                finish_reason="stop" if text.ends else "length",
            )
            for number, text in enumerate(texts)
        ]
    )
