"""The identity of a checkpoint: two folders with one fingerprint define the same model.

The names of cached corpora and proxies contain it, so that a model that was edited in place never gets the
text of the model before it. A run records it with the fingerprints of its other inputs (:mod:`deploy.run.inputs_record`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import xxhash

WHOLE_BYTES = 8 << 30
"""Checkpoints up to this size are hashed whole, which takes seconds. Of larger ones, every tensor is sampled."""
PIECE_BYTES = 1 << 16
"""A large checkpoint's tensor is hashed at its start, in its middle and at its end, in pieces of this size."""
_IRRELEVANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of config.json that do not change what the weights compute."""


_TEXT_FILES = (
    "*token*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""Files beside the weights that decide the ids of a text, and where a text ends."""


def checkpoint_fingerprint(folder: Path) -> str:
    """Hash config.json and the weights of a checkpoint, as 32 hexadecimal digits.

    Up to ``WHOLE_BYTES`` of weights, every byte counts. Beyond that, the headers count (names, shapes, number formats
    and places of all tensors), and of every tensor the first, the middle and the last ``PIECE_BYTES``. This notices
    another model, a further training and another quantisation, which change almost every number. It cannot notice an
    edit of a few numbers between the pieces of a large tensor, nor a broken disk there.
    """
    state = xxhash.xxh3_128()
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    state.update(json.dumps(kept, sort_keys=True).encode())
    files = sorted(folder.glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in files) <= WHOLE_BYTES
    for path in files:
        with path.open("rb") as file:
            for piece in _all_pieces(file) if whole else _sampled_pieces(file):
                state.update(piece)
    return state.hexdigest()


def text_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's tokenizer and chat template, and its generation config."""
    return sorted({file for pattern in _TEXT_FILES for file in folder.glob(pattern) if file.is_file()})


def file_fingerprint(path: Path) -> str:
    """Hash a file whole, as 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        for piece in _all_pieces(file):
            state.update(piece)
    return state.hexdigest()


def _all_pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES << 6):
        yield piece


def _sampled_pieces(file: IO[bytes]) -> Iterator[bytes]:
    """The header of a safetensors file and pieces of every tensor."""
    size = int.from_bytes(file.read(8), "little")
    header = file.read(size)
    yield header
    for name, tensor in sorted(json.loads(header).items()):
        if name == "__metadata__":
            continue
        start, end = tensor["data_offsets"]
        for place in sorted(
            {start, max(start, (start + end - PIECE_BYTES) // 2), max(start, end - PIECE_BYTES)}
        ):
            file.seek(8 + size + place)
            yield file.read(min(PIECE_BYTES, end - place))
