"""The identity of a checkpoint: two folders with one fingerprint define the same model.

The names of cached corpora and proxies contain it, so that a model that was edited in place never gets the
text of the model before it.
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


def checkpoint_fingerprint(folder: Path) -> str:
    """Hash config.json and the weights of a checkpoint, as 32 hexadecimal digits."""
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
