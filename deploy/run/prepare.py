"""Everything a run needs on disk before its actors start: prompt tables and a student.

Prompt tables lie in ``<run>/data``; they are small and made anew when they are missing. The
teacher's corpora, proxies and models lie in the cache, by fingerprint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import xxhash

from deploy.fetch import cache_dir
from deploy.run.preflight import Preflight
from distill.config import RunConfig
from distill.data import corpus_table, heldout_rows, reference_corpus, training_rows, write_table
from distill.files import new_folder, write_json
from distill.machine.hardware import resolve_dtype
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs
from distill.schema import trajectory_schema

_NODE = "local"
_PIECES, _PIECE_BYTES = 64, 1 << 16
"""What is read of a file of weights to know it again."""
_TRAINING_FILE = "training.json"
"""In a proxy's folder in the cache: what its training took."""


def prepare(config: RunConfig, preflight: Preflight, folder: RunFolder) -> RunInputs:
    """Write the tables; cut the student when it is to be cut."""
    train, heldout = training_rows(preflight.prompts), heldout_rows(preflight.prompts)
    tables = _write_tables(config, preflight, folder.path / "data")
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
    if config.recipe.teacher_text == "sampled":
        teacher_text = corpora / f"{_hash(identity | samples, train, num_corpus)}.parquet"
    else:
        teacher_text = tables["references" if config.recipe.teacher_text == "reference" else "no-text"]
    student_dir = _student(config, preflight, folder)
    scoring_dir = teacher_dir
    if config.recipe.teacher_gives == "text":
        scoring_dir = preflight.proxy.folder if preflight.proxy is not None else student_dir
    return RunInputs(
        run_dir=str(folder.path),
        run_id=folder.run_id,
        node=_NODE,
        teacher_dir=str(teacher_dir),
        scoring_dir=str(scoring_dir),
        student_dir=str(student_dir),
        train_prompts=str(tables["train"]),
        num_prompts=train.num_rows,
        heldout_prompts=str(tables["heldout"]),
        references=str(tables["references"]) if "references" in tables else None,
        teacher_text=str(teacher_text),
        num_corpus_prompts=num_corpus,
        heldout_corpus=str(corpora / f"{_hash(identity, heldout, config.evaluation.num_prompts)}.parquet"),
        stop_token_ids=preflight.teacher.stop_token_ids,
        num_tokens=preflight.num_tokens,
    )


def _write_tables(config: RunConfig, preflight: Preflight, folder: Path) -> dict[str, Path]:
    """Write the tables that are missing; returns the paths of all, by name."""
    prompts = preflight.prompts
    tables = {"train": training_rows(prompts), "heldout": heldout_rows(prompts)}
    if preflight.num_references:
        tables["references"] = corpus_table(reference_corpus(prompts))
    if config.recipe.teacher_text == "none":
        tables["no-text"] = trajectory_schema().empty_table()
    paths = {name: folder / f"{name}.parquet" for name in tables}
    for name, path in paths.items():
        if not path.exists():
            write_table(tables[name], path)
    return paths


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
