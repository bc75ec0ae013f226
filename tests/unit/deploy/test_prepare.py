"""What a run's stages start from: paths by recipe, and the tables on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from deploy.run.preflight import Preflight
from deploy.run.prepare import prepare
from distill.config.tree import fingerprint, to_yaml
from distill.data import read_table
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs
from tests.tiny import make_world, save_tiny_llama, tiny_config

TRANSFORMERS = ["rollout.engine=transformers", "scoring.engine=transformers"]


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    make_world(tmp_path)
    return tmp_path


def prepared(world: Path, *overrides: str) -> RunInputs:
    config = tiny_config(world, *TRANSFORMERS, *overrides)
    preflight = Preflight(config)
    preflight.run()
    preflight.require()
    with RunFolder(config.run_dir) as folder:
        folder.create(to_yaml(config), fingerprint(config))
        return prepare(config, preflight, folder)


def test_inputs_are_plain_values(world: Path) -> None:
    inputs = prepared(world)
    assert {type(value) for value in asdict(inputs).values()} <= {str, int, tuple}
    assert inputs.run_dir == str(world / "run")
    assert inputs.student_dir == str(world / "run" / "student-init")
    assert inputs.num_prompts == read_table(inputs.train_prompts).num_rows == 16
    assert read_table(inputs.heldout_prompts).num_rows == 8


def test_teacher_text_follows_the_recipe(world: Path) -> None:
    sampled = prepared(world)
    assert Path(sampled.teacher_text).parent == world / "cache" / "corpora"
    assert sampled.teacher_text != sampled.heldout_corpus
    assert not Path(sampled.teacher_text).exists()  # the corpus stage writes it
    assert sampled.num_corpus_prompts == 12
    references = prepared(world, "recipe.teacher_text=reference", f"run_dir={world}/references")
    assert references.teacher_text == references.references
    assert read_table(references.teacher_text).num_rows == references.num_prompts
    assert references.num_corpus_prompts == 0
    none = prepared(world, "recipe=minillm", f"run_dir={world}/none")
    assert read_table(none.teacher_text).num_rows == 0
    assert read_table(none.teacher_text).schema == read_table(references.teacher_text).schema
    assert none.num_corpus_prompts == 0


def test_scored_checkpoint_is_the_teachers_or_where_the_proxy_starts(world: Path) -> None:
    inputs = prepared(world)
    assert inputs.scoring_dir == inputs.teacher_dir and not inputs.has_proxy
    text_only = prepared(world, "recipe=ammd_blackbox", f"run_dir={world}/text-only")
    assert text_only.scoring_dir == text_only.student_dir and text_only.has_proxy
    proxy = save_tiny_llama(world / "proxy", seed=1)
    given = prepared(world, "recipe=ammd_blackbox", f"proxy.model={proxy}", f"run_dir={world}/given")
    assert given.scoring_dir == str(proxy) and given.has_proxy


def test_a_missing_table_is_written_again(world: Path) -> None:
    """A start may have died between two tables."""
    inputs = prepared(world)
    tables = [inputs.train_prompts, inputs.heldout_prompts, inputs.references]
    before = {path: Path(path).read_bytes() for path in tables if path}
    assert len(before) == 3
    for path in before:
        Path(path).unlink()
        prepared(world)
        assert Path(path).read_bytes() == before[path]
