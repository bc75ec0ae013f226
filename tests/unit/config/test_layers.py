"""Loading: the layers of file, presets and overrides."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import RecipeConfig, StudentInitConfig
from distill.config.load import load_config, override
from distill.config.tree import flat_settings, flatten, setting_names, to_yaml
from distill.errors import ConfigError
from tests.unit.config.settings import STUDENT

CUT = ["student.init.from=teacher", "student.init.num_layers=1"]


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


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.sampled_from(
            [
                "2025_11_26",
                "my data #1.jsonl",
                "1e5",
                "on",
                "0x10",
                "2025-11-26",
                "a: b",
                "'q'",
                '"q"',
                " x ",
                "null",
                "~",
                "[a]",
                "{",
                "#",
            ]
        ),
        st.text(st.characters(codec="utf-8", exclude_characters="$"), min_size=1),
    )
)
def test_text_on_the_command_line_comes_back_as_it_is(text):
    for name in ("run_dir", "data.path"):
        assert flat_settings(load_config(None, [*CUT, override(name, text)]))[name] == text


@pytest.mark.parametrize("text", ["2025_11_26", "1e5", "on", "0x10", "2025-11-26", "12:30:45", "NaN", ".5"])
def test_text_in_a_file_needs_no_quotes(load, text):
    assert load(STUDENT + f"run_dir: {text}\nevaluation: {{shown_prompts: [{text}, b]}}").run_dir == text
    assert load(STUDENT + f"teacher: {{revision: {text}}}").teacher.revision == text
    assert load(STUDENT + f"evaluation: {{shown_prompts: [{text}, b]}}").evaluation.shown_prompts == [
        text,
        "b",
    ]


def test_null_is_null_only_where_it_can_be(load):
    for text in ("null", "~", ""):
        assert load(STUDENT, [f"teacher.revision={text}"]).teacher.revision is None
        assert load(STUDENT + f"teacher: {{revision: {text}}}").teacher.revision is None
    assert load(STUDENT + "teacher: {revision: 'null'}").teacher.revision == "null"
    assert load(STUDENT, ["run_dir=null"]).run_dir == "null"


def test_numbers_and_lists_are_read_by_their_type(load):
    config = load(STUDENT, ["learner.learning_rate=1e-3", "sft.enabled=off", "seed=1_0"])
    assert (config.learner.learning_rate, config.sft.enabled, config.seed) == (1e-3, False, 10)
    cut = load(STUDENT, ["student.init={from: teacher, num_layers: null, layers: [0, 2]}"]).student.init
    assert cut.layers == [0, 2] and cut.num_layers is None
    assert load(STUDENT, ["student.init.num_layers=", "student.init.layers=[0,1]"]).student.init.layers == [
        0,
        1,
    ]
