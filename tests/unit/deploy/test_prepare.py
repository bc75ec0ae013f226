"""The inputs of a run, and the estimates made of them, on the tests' tiny models."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from deploy.run.preflight import Preflight
from deploy.run.prepare import prepare
from distill.config.load import load_config
from distill.config.tree import resume_fingerprint, to_yaml
from distill.data import TextCorpus, read_table
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs
from learner.process.cut import cut
from tests.tiny import tiny_config

Prepared = Callable[..., RunInputs]


@pytest.fixture
def inputs_of(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """A function from settings to the inputs of their run, whose folder is ``run``."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))

    def make(*settings: str) -> RunInputs:
        config = tiny_config(world, f"run_dir={tmp_path}/run", *settings)
        preflight = Preflight(config)
        preflight.run()
        preflight.require()
        with RunFolder(config.run_dir) as folder:
            folder.create(to_yaml(config), resume_fingerprint(config))
            return prepare(config, preflight, folder)

    return make


def test_inputs_are_plain_values(inputs_of: Prepared) -> None:
    inputs = inputs_of()
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        assert isinstance(value, str | int | tuple | None), field.name
    assert pickle.loads(pickle.dumps(inputs)) == inputs


def test_sampled_teacher_text_is_in_the_cache(inputs_of: Prepared, tmp_path: Path) -> None:
    inputs = inputs_of()
    assert (
        Path(inputs.teacher_text).parent == Path(inputs.heldout_corpus).parent == tmp_path / "cache/corpora"
    )
    assert inputs.teacher_text != inputs.heldout_corpus
    assert (inputs.num_corpus_prompts, inputs.num_prompts) == (12, 16)
    assert inputs.scoring_dir == inputs.teacher_dir and not inputs.has_proxy
    assert inputs.student_dir == f"{inputs.run_dir}/student-init" and not Path(inputs.student_dir).exists()


def test_reference_text_is_the_references(inputs_of: Prepared) -> None:
    inputs = inputs_of("recipe=sft")
    assert inputs.teacher_text == inputs.references is not None
    assert inputs.num_corpus_prompts == 0
    assert TextCorpus.read(inputs.teacher_text).num_rows == inputs.num_prompts


def test_recipe_without_teacher_text_has_an_empty_corpus(inputs_of: Prepared) -> None:
    inputs = inputs_of("recipe=opd")
    assert TextCorpus.read(inputs.teacher_text).num_rows == 0
    assert inputs.num_corpus_prompts == 0


def test_tables_that_a_crash_left_out_are_written(inputs_of: Prepared) -> None:
    inputs = inputs_of()
    assert inputs.references is not None
    for path in (inputs.heldout_prompts, inputs.references):
        Path(path).unlink()
    assert inputs_of() == inputs
    assert read_table(inputs.heldout_prompts).num_rows == 8
    assert Path(inputs.references).exists()


@pytest.mark.parametrize("setting", ["rollout.engine=transformers", "rollout.dtype=bfloat16"])
def test_corpus_depends_on_the_engine_that_samples_it(
    inputs_of: Prepared, tmp_path: Path, setting: str
) -> None:
    first = inputs_of()
    (tmp_path / "run").rename(tmp_path / "first")
    second = inputs_of(setting)
    assert {first.teacher_text, first.heldout_corpus}.isdisjoint({second.teacher_text, second.heldout_corpus})


def test_corpus_does_not_depend_on_the_engine_that_scores(inputs_of: Prepared, tmp_path: Path) -> None:
    first = inputs_of()
    (tmp_path / "run").rename(tmp_path / "first")
    assert inputs_of("scoring.engine=transformers").teacher_text == first.teacher_text


@pytest.mark.parametrize(("recipe", "name"), [("kd", "sampler"), ("ammd", "rollout")])
def test_memory_estimate_counts_the_sampler_of_every_recipe(world: Path, recipe: str, name: str) -> None:
    """Evaluations sample the student in recipes without student text as well."""
    preflight = Preflight(tiny_config(world, f"recipe={recipe}", "rollout.kv_cache_gib=3"))
    preflight.run()
    preflight.require()
    estimate = preflight.estimates.memory()
    assert set(estimate) == {"teacher", "learner", "ray", name}
    assert estimate[name] > 3 << 30


def test_memory_estimate_counts_every_replica_and_the_copy_for_evaluations(world: Path) -> None:
    def memory(*settings: str) -> dict[str, int]:
        preflight = Preflight(tiny_config(world, *settings))
        preflight.run()
        preflight.require()
        return preflight.estimates.memory()

    one, two = memory(), memory("rollout.replicas=2", "scoring.replicas=2")
    assert (two["rollout"], two["teacher"]) == (2 * one["rollout"], 2 * one["teacher"])
    assert memory("replay.max_policy_age=1")["learner"] > one["learner"]


def window(world: Path, *settings: str) -> int:
    preflight = Preflight(tiny_config(world, *settings))
    preflight.run()
    preflight.require()
    return preflight.estimates.window()


def test_buffer_estimate_has_every_response_at_its_own_limit(world: Path) -> None:
    """Two updates of four rows, with prompts of 64 tokens; the teacher's states are 64 wide."""
    fixed = 4 * 64 + 512
    assert window(world, "recipe=kd", "data.max_reference_tokens=100") == 2 * 4 * (100 * (128 + 16) + fixed)
    assert window(world, "recipe=fkl", "corpus.max_new_tokens=20") == 2 * 4 * (20 * (128 + 16) + fixed)
    assert window(world, "recipe=sft", "data.max_reference_tokens=100") == 2 * 4 * (100 * 16 + fixed)
    both = window(world, "recipe=ammd", "corpus.max_new_tokens=20", "rollout.samples_per_prompt=1")
    assert both == 2 * 4 * (28 * (128 + 16) + 2 * fixed)


def test_memory_estimate_grows_with_the_references(world: Path) -> None:
    def learner(limit: int) -> int:
        settings = ("recipe=kd", "learner.keep_activations=true", f"data.max_reference_tokens={limit}")
        preflight = Preflight(tiny_config(world, *settings))
        preflight.run()
        preflight.require()
        return preflight.estimates.memory()["learner"]

    assert learner(400) > learner(100)


@pytest.mark.parametrize(
    ("settings", "layers", "reason"),
    [
        ((), [0], "by block influence on 16 texts"),
        (("student.init.select=even",), [0], "evenly spaced"),
        (("student.init.num_layers=null", "student.init.layers=[1]"), [1], "as configured"),
    ],
)
def test_cut_keeps_the_chosen_layers_and_says_why(
    inputs_of: Prepared, settings: tuple[str, ...], layers: list[int], reason: str
) -> None:
    inputs = inputs_of(*settings)
    config = load_config(Path(inputs.run_dir) / "config.yaml")
    assert cut(config, inputs).startswith(f"kept layers {layers[0]} of 0-1, {reason}")
    student = json.loads((Path(inputs.student_dir) / "config.json").read_text())
    assert student["distill_kept_layers"] == layers and student["num_hidden_layers"] == 1
    choice = json.loads(RunFolder(inputs.run_dir).cut_layers.read_text())
    assert choice["layers"] == layers
    measured = choice["block_influence"]
    assert len(measured) == 2 if reason.startswith("by") else measured is None
