"""Everything a run needs on disk before its actors start: prompt tables and a student.

Prompt tables lie in ``<run>/data``; they are small and made anew when they are missing. The
teacher's corpora, proxies and models lie in the cache, by fingerprint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from deploy.fetch import cache_dir
from deploy.run.preflight import Preflight
from distill.config import RunConfig
from distill.data import corpus_table, heldout_rows, reference_corpus, training_rows, write_table
from distill.files import new_folder, write_json
from distill.machine.hardware import resolve_dtype
from distill.run.folder import RunFolder

_PIECES, _PIECE_BYTES = 64, 1 << 16
"""What is read of a file of weights to know it again."""
_TRAINING_FILE = "training.json"
"""In a proxy's folder in the cache: what its training took."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Paths and counts that the stages go on with."""

    teacher_dir: Path
    student_init: Path
    """The student before the warm start."""
    proxy_init: Path | None
    """What stands in for the teacher, before its training; None: the student's start, or nothing."""
    train_prompts: Path
    heldout_prompts: Path
    references: Path | None
    """References of the training prompts as a corpus; None when the data has none."""
    num_prompts: int
    stop_token_ids: tuple[int, ...]
    num_tokens: int
    """Common vocabulary of teacher and student."""
    teacher_corpus: Path
    """Where the teacher's text on the training prompts is, or is to be written."""
    heldout_corpus: Path
    num_corpus_prompts: int
    """Training prompts that the teacher answers; 0 when the recipe does not use its text."""


def prepare(config: RunConfig, preflight: Preflight, folder: RunFolder) -> Prepared:
    """Write the tables; cut the student when it is to be cut."""
    data = folder.path / "data"
    paths = {name: data / f"{name}.parquet" for name in ("train", "heldout", "references")}
    table = preflight.prompts
    train, heldout = training_rows(table), heldout_rows(table)
    if not paths["train"].exists():
        write_table(train, paths["train"])
        write_table(heldout, paths["heldout"])
        if preflight.num_references:
            write_table(corpus_table(reference_corpus(table)), paths["references"])
    teacher_dir = preflight.teacher.folder
    num_corpus = 0
    if config.recipe.teacher_text == "sampled":
        num_corpus = min(config.corpus.num_prompts or train.num_rows, train.num_rows)
    identity = {
        "teacher": _fingerprint_of(teacher_dir),
        "max_new_tokens": config.corpus.max_new_tokens,
        "seed": config.corpus.seed,
        "stop": preflight.teacher.stop_token_ids,
        "num_tokens": preflight.num_tokens,
        "engine": config.scoring.engine,
        "dtype": resolve_dtype(config.scoring.dtype),
    }
    samples = {"samples_per_prompt": config.corpus.samples_per_prompt}  # held-out prompts have one each
    corpora = cache_dir() / "corpora"
    return Prepared(
        teacher_dir=teacher_dir,
        student_init=_student(config, preflight, folder),
        proxy_init=preflight.proxy.folder if preflight.proxy is not None else None,
        train_prompts=paths["train"],
        heldout_prompts=paths["heldout"],
        references=paths["references"] if preflight.num_references else None,
        num_prompts=train.num_rows,
        stop_token_ids=preflight.teacher.stop_token_ids,
        num_tokens=preflight.num_tokens,
        teacher_corpus=corpora / f"{_hash(identity | samples, train, num_corpus)}.parquet",
        heldout_corpus=corpora / f"{_hash(identity, heldout, config.evaluation.num_prompts)}.parquet",
        num_corpus_prompts=num_corpus,
    )


def _student(config: RunConfig, preflight: Preflight, folder: RunFolder) -> Path:
    if config.student.init.source is None:
        return preflight.student.folder
    from learner.model.cut import cut_student

    cut = folder.path / "student-init"
    if not cut.exists():
        cut_student(preflight.teacher.folder, cut, config.student.init.num_layers or 0)
    return cut


def proxy_in_cache(config: RunConfig, start: Path, corpus: Path) -> Path:
    """Where the proxy that is trained so on this text lies, or is to be kept: runs that differ in the
    student's settings alone share it."""
    learner = config.learner
    identity = {
        "start": _fingerprint_of(start),
        "corpus": corpus.stem,
        "training": asdict(config.proxy.training),
        "optimizer": [learner.beta1, learner.beta2, learner.weight_decay, learner.max_grad_norm],
        "precision": learner.precision,
        "seed": config.seed,
    }
    text = json.dumps(identity, sort_keys=True)
    return cache_dir() / "proxies" / xxhash.xxh3_128_hexdigest(text.encode())


def keep_proxy(trained: Path, cached: Path, training_s: float) -> None:
    """Move a trained proxy into the cache, by one rename; what another run has put there stays."""
    write_json(trained / _TRAINING_FILE, {"training_s": round(training_s, 2)})
    with new_folder(cached, if_exists="keep") as arriving:
        for file in trained.iterdir():
            shutil.move(file, arriving)
    trained.rmdir()


def training_seconds(proxy: Path) -> float:
    """What its training took, in the run that trained it."""
    return json.loads((proxy / _TRAINING_FILE).read_text())["training_s"]


def _hash(identity: Mapping[str, object], prompts: object, num_prompts: int) -> str:
    """Name of a corpus: teacher, sampling, and the very prompts that are answered."""
    tokens = prompts["prompt_tokens"].slice(0, num_prompts).to_pylist()  # type: ignore[index]
    text = json.dumps([identity, tokens], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _fingerprint_of(model: Path) -> str:
    """A checkpoint by its weights: sizes, and pieces of every file from its start to its end."""
    state = xxhash.xxh3_64()
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        state.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for piece in range(_PIECES):
                file.seek(max(0, size - _PIECE_BYTES) * piece // (_PIECES - 1))
                state.update(file.read(_PIECE_BYTES))
    return state.hexdigest()
