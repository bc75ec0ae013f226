"""What runs share through the cache: teacher corpora and trained proxies, found by fingerprint.

Runs of other machines may use the same cache, so a temporary file there has a living writer until it is a day old.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import xxhash

from deploy.fetch import cache_dir
from deploy.run.identity import checkpoint_fingerprint
from distill.config import RunConfig
from distill.files import new_folder, remove_temporaries, write_json
from distill.room import IN_CACHE, advising

_DEAD_AFTER_S = 86_400.0
"""Time without a change after which the writer of a temporary file counts as dead. None writes for so long into one."""
_TRAINING_FILE = "training.json"
"""A file in a cached proxy's folder: the cost of its training."""


def remove_unfinished() -> None:
    """Delete what killed writers left in the cache. What belongs to another user stays."""
    root = cache_dir()
    for folder in (root, *root.glob("*/"), *root.glob("corpora/*.parts/")):
        with suppress(OSError):  # another run may be deleting the same
            remove_temporaries(folder, unchanged_s=_DEAD_AFTER_S)


def corpus_file(sampling: Mapping[str, object], prompts: pa.Table, num_prompts: int) -> Path:
    """The file of a teacher corpus. ``sampling``: the teacher, and every setting that its text depends on.

    The name covers the tokens of the first ``num_prompts`` prompts as well.
    """
    tokens = prompts["prompt_tokens"].slice(0, num_prompts).to_pylist()
    text = json.dumps([sampling, tokens], sort_keys=True)
    return cache_dir() / "corpora" / f"{xxhash.xxh3_128_hexdigest(text.encode())}.parquet"


def proxy_folder(config: RunConfig, start: Path, corpus: Path) -> Path:
    """The folder of the proxy that ``config`` trains from ``start`` on ``corpus``.

    Runs that differ only in settings of the student share a proxy.
    """
    learner = config.learner
    identity = {
        "start": checkpoint_fingerprint(start),
        "corpus": corpus.stem,
        "training": asdict(config.proxy.training),
        "optimizer": [learner.beta1, learner.beta2, learner.weight_decay, learner.max_grad_norm],
        "precision": learner.precision,
        "seed": config.seed,
    }
    text = json.dumps(identity, sort_keys=True)
    return cache_dir() / "proxies" / xxhash.xxh3_128_hexdigest(text.encode())


def note_proxy_training(trained: Path, seconds: float) -> None:
    """Record beside a trained proxy how long that took."""
    write_json(trained / _TRAINING_FILE, {"training_s": round(seconds, 2)})


def keep_proxy(trained: Path, cached: Path) -> None:
    """Move a trained proxy into the cache, which may be on another disk. A folder that is there already stays.

    Raises: NoSpace, and leaves the proxy where it is.
    """
    with advising(IN_CACHE), new_folder(cached, if_exists="keep") as arriving:
        shutil.copytree(trained, arriving, dirs_exist_ok=True)
    shutil.rmtree(trained)


def proxy_training_s(proxy: Path) -> float | None:
    """Seconds that a cached proxy's training took, in the run that trained it; None if a crash came before it was written."""
    file = proxy / _TRAINING_FILE
    return json.loads(file.read_text())["training_s"] if file.exists() else None
