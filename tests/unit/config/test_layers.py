"""Loading: the layers of file, presets and overrides."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distill.config import RecipeConfig, StudentInitConfig
from distill.config.tree import flatten, setting_names, to_yaml
from distill.errors import ConfigError
from tests.unit.config.settings import STUDENT


def test_overrides_take_precedence_over_the_file(load):
    config = load(
        STUDENT + "learner:\n  num_updates: 7\n  learning_rate: 1e-5\n", ["learner.num_updates=40", "seed=3"]
    )
    assert (config.learner.num_updates, config.learner.learning_rate, config.seed) == (40, 1e-5, 3)


def test_the_init_source_is_called_from_in_yaml(load):
    config = load(STUDENT, ["student.init.num_layers=4"])
    assert config.student.init == StudentInitConfig(source="teacher", num_layers=4)
    assert "from: teacher" in to_yaml(config)
    assert "source" not in to_yaml(config)
    assert "student.init.from" in setting_names()


def test_an_empty_section_changes_nothing(load):
    assert load(STUDENT + "learner:\n") == load(STUDENT)
    assert load(STUDENT + "learner: {num_updates: 7}", ["learner="]).learner.num_updates == 7


def test_a_value_can_refer_to_another_setting(load):
    assert load(STUDENT + "seed: 5\ncorpus: {seed: '${seed}'}").corpus.seed == 5


def test_recipe_by_name_in_file_and_override(load):
    assert load(STUDENT + "recipe: kd").recipe.lm_weight == 0.5
    config = load(STUDENT + "recipe: ammd", ["recipe=kd", "recipe.loss_weight=0.9"])
    assert (config.recipe.name, config.recipe.loss_weight, config.recipe.anchor_weight) == ("kd", 0.9, 0.0)


def test_a_later_recipe_replaces_the_whole_section(load):
    config = load(STUDENT + "recipe: ammd_paper", ["recipe=gkd"])
    assert config.recipe.long_weight == RecipeConfig().long_weight


def test_a_preset_applies_at_the_layer_that_names_it(load):
    file_wins = load(STUDENT + "recipe: ammd_paper\ncritic: {features: both}")
    override_wins = load(STUDENT + "critic: {features: both}", ["recipe=ammd_paper"])
    assert (file_wins.critic.features, override_wins.critic.features) == ("both", "teacher")


def test_a_file_can_set_fields_of_the_recipe(load):
    assert load(STUDENT + "recipe: {beta: 0.5}").recipe == RecipeConfig(beta=0.5)


def test_a_preset_with_fields_on_top(load):
    in_file = load(STUDENT + "recipe: {preset: ammd_paper, beta: 0.1}\ncritic: {rank: 8}")
    assert in_file == load(STUDENT, ["recipe=ammd_paper", "recipe.beta=0.1", "critic.rank=8"])
    assert load(STUDENT + "recipe: {beta: 0.1}", ["recipe.preset=kd"]) == load(STUDENT + "recipe: kd")
    for written in ("[kd]", "3", "kdd"):
        with pytest.raises(ConfigError, match=r"recipe=.* must be one of ammd"):
            load(STUDENT + f"recipe: {{preset: {written}}}")


def test_flatten_joins_names_with_dots():
    assert flatten({"a": {"b": 1, "c.d": 2}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


def test_loading_imports_no_heavy_library():
    code = (
        "import distill.config.load, sys; "
        "print([name for name in ('torch', 'transformers', 'ray', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
