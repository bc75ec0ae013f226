"""The task `tiny-translation`: German phrases and sentences into English, with tiny models.

The pairs are entries of a dictionary that Debian packages (`trans-de-en`, GPL-2 or later). A translation can
go wrong at one word and stay wrong, so this task is the one for questions about student text and the long
horizon. It has two starts for the student, the usual one and a weak one.
"""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deploy.fetch import DOWNLOAD_TIMEOUT_S, FetchError, cache_dir
from deploy.study.tasks.tiny_models import TinyModel, TrainingText, are_made, make_task, train_tokenizer
from distill.errors import NO_VALUE
from distill.files import write_bytes

PACKAGE = "trans-de-en"
MEMBER = "usr/share/trans/de-en"
MEMBER_SHA256 = "34052c6021d09eadfee7a893a789204265954df70fe9c36d38fa00058d79d326"
"""That of version 1.9-6 (Debian 12)."""
VOCABULARY = 2048
NUM_PROMPTS = 6000
"""Pairs that become prompts; no model is trained on them."""
NUM_TUNING = 1500
"""The number of prompts among them on which settings are tuned; no reported run sees these."""
MIN_WORDS, MIN_PROMPT_WORDS, MAX_WORDS = 3, 6, 24
"""Limits on the words of each side of a pair. Prompts are longer, so that an answer can go wrong half way."""

MODELS = {
    "teacher": TinyModel(
        num_layers=4, hidden_size=256, num_updates=1500, rows_per_update=128, learning_rate=2e-3
    ),
    "student": TinyModel(
        num_layers=2, hidden_size=64, num_updates=600, rows_per_update=64, learning_rate=3e-3
    ),
    "weak": TinyModel(num_layers=2, hidden_size=64, num_updates=150, rows_per_update=64, learning_rate=3e-3),
}


def tiny_translation_folder() -> Path:
    """The task's folder: ``prompts.jsonl``, ``tuning.jsonl``, ``teacher``, ``student``, ``weak``."""
    return cache_dir() / "tasks" / "tiny-translation"


def make_tiny_translation(say: Callable[[str], None] = print) -> None:
    """Make the parts of the task that do not exist yet.

    Raises: FetchError.
    """
    folder = tiny_translation_folder()
    if are_made(MODELS, folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    train, for_prompts = _split(_pairs(_dictionary(say)))
    prompts = [(_prompt(german), f" {english}") for german, english in for_prompts]
    tokenizer = train_tokenizer((f"{_prompt(de)} {en}" for de, en in train), VOCABULARY)
    texts = _as_texts(tokenizer, train)
    make_task(folder, MODELS, tokenizer, texts, prompts, num_tuning=NUM_TUNING, say=say)


def _dictionary(say: Callable[[str], None]) -> str:
    """The text of the dictionary, from the cache or from the Debian package.

    Raises: FetchError.
    """
    path = cache_dir() / "data" / "de-en"
    if not path.is_file():
        say(f"downloading the Debian package {PACKAGE} (6 MB, GPL-2 or later)")
        with tempfile.TemporaryDirectory() as scratch:
            _run(["apt-get", "download", PACKAGE], scratch, path)
            for package in Path(scratch).glob("*.deb"):
                _run(["dpkg", "-x", package.name, "."], scratch, path)
            write_bytes(path, (Path(scratch) / MEMBER).read_bytes())
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != MEMBER_SHA256:
        say(f"note: {path} is another version (sha256 {found[:12]}...), so results will differ slightly")
    return data.decode()


def _run(command: list[str], folder: str, wanted: Path) -> None:
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip() or str(error)
        raise FetchError(
            f"{PACKAGE}: {' '.join(command)}",
            NO_VALUE,
            f"succeed ({reason.splitlines()[-1]})",
            f"run apt-get update, or put the package's {MEMBER} at {wanted}",
        ) from None


def _pairs(dictionary: str) -> list[tuple[str, str]]:
    """(German, English) pairs without the dictionary's notes, in the same order on every machine."""
    pairs = list(dict.fromkeys(_entries(dictionary)))
    random.Random(0).shuffle(pairs)
    return pairs


def _entries(dictionary: str) -> Iterator[tuple[str, str]]:
    for line in dictionary.splitlines():
        if line.startswith("#") or " :: " not in line:
            continue
        sides = [side.split(" | ") for side in line.split(" :: ", 1)]
        if len(sides[0]) != len(sides[1]):
            continue
        for german, english in zip(*sides, strict=True):
            pair = _plain(german), _plain(english)
            if all(MIN_WORDS <= len(side.split()) <= MAX_WORDS and "/" not in side for side in pair):
                yield pair


def _plain(text: str) -> str:
    """The first alternative of an entry, without the notes in brackets."""
    return " ".join(re.sub(r"[\[{(<][^\]})>]*[\]})>]", "", text.split(";")[0]).split())


def _split(pairs: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(pairs to train on, pairs for prompts); no German side is in both."""
    prompts: dict[str, str] = {}
    for german, english in pairs:
        if len(prompts) == NUM_PROMPTS:
            break
        if min(len(german.split()), len(english.split())) >= MIN_PROMPT_WORDS:
            prompts.setdefault(german, english)
    return [pair for pair in pairs if pair[0] not in prompts], list(prompts.items())


def _prompt(german: str) -> str:
    return f"{german} =>"


def _as_texts(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[TrainingText]:
    prompts = tokenizer([_prompt(german) for german, _ in pairs])["input_ids"]
    answers = tokenizer([f" {english}" for _, english in pairs])["input_ids"]
    return [
        TrainingText(prompt, [*answer, tokenizer.eos_token_id], ends=True)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
