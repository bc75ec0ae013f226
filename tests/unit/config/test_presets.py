"""The settings that make each preset the method it is named after.

A preset's entry contains the settings in which it differs from the defaults, which are ``ammd``'s. The tests of
gradients use the presets unchanged, so only this test notices a preset that has become a different method.
"""

from __future__ import annotations

import pytest

from deploy import PRESETS
from distill.config import RecipeConfig
from distill.config.load import load_config
from distill.config.tree import flat_settings
from tests.unit.config.settings import STUDENT

OVERRIDES = ["student.init.from=teacher", "student.init.num_layers=1"]
DEFAULTS = {
    "recipe.teacher_text": "sampled",
    "recipe.student_text": "every_update",
    "recipe.teacher_gives": "probabilities",
    "recipe.beta": 0.25,
    "recipe.loss": "moment_gap",
    "recipe.loss_weight": 1.0,
    "recipe.anchor": "forward_kl",
    "recipe.anchor_weight": 0.5,
    "recipe.lm_weight": 0.0,
    "recipe.long_weight": 0.0,
    "recipe.gamma": 0.95,
    "recipe.skew": 0.1,
    "recipe.jsd_beta": 0.5,
    "recipe.student_fraction": 0.5,
    "recipe.fraction_tolerance": 0.1,
    "critic.form": "learned",
    "critic.features": "ratio",
    "critic.rank": 64,
    "critic.bound": 1.0,
    "critic.variance_penalty": None,
    "critic.zero_sum": False,
    "critic.num_steps": 3,
    "critic.learning_rate": 0.001,
    "critic.ratio_start": 0.5,
    "credit.form": "practical",
    "credit.ratio": "token",
    "credit.ratio_max": 2.0,
    "credit.baseline": "leave_one_out",
    "credit.cost": "moment_gap",
    "credit.span": "future",
    "credit.normalize": "discount",
    "rollout.samples_per_prompt": 2,
    "replay.max_policy_age": 0,
    "replay.samples_per_insert": 1.0,
}
DIFFERENCES = {
    "ammd": {},
    "ammd_blackbox": {
        "recipe.teacher_gives": "text",
        "recipe.student_text": "none",
        "recipe.loss_weight": 5.0,
        "recipe.anchor_weight": 0.0,
        "recipe.lm_weight": 1.0,
    },
    "ammd_paper": {
        "recipe.beta": 0.5,
        "recipe.anchor_weight": 0.1,
        "recipe.long_weight": 1.0,
        "critic.features": "teacher",
    },
    "anchor_only": {"recipe.student_text": "none", "recipe.loss_weight": 0.0},
    "distillm": {
        "recipe.teacher_text": "reference",
        "recipe.student_text": "mixed",
        "recipe.student_fraction": 0.0,
        "recipe.fraction_step": 0.1,
        "recipe.loss": "skew_forward_kl",
        "recipe.anchor_weight": 0.0,
        "replay.samples_per_insert": 4.0,
        "replay.max_times_sampled": 8,
        "replay.max_policy_age": 8,
    },
    "distillm2": {
        "recipe.beta": 0.5,
        "recipe.loss": "skew_forward_kl",
        "recipe.student_text_loss": "skew_reverse_kl",
        "recipe.anchor_weight": 0.0,
    },
    "fkl": {"recipe.student_text": "none", "recipe.loss": "forward_kl", "recipe.anchor_weight": 0.0},
    "gkd": {
        "recipe.teacher_text": "reference",
        "recipe.student_text": "mixed",
        "recipe.loss": "generalized_jsd",
        "recipe.anchor_weight": 0.0,
    },
    "imitkd": {
        "recipe.teacher_text": "none",
        "recipe.beta": 1.0,
        "recipe.loss": "forward_kl",
        "recipe.anchor_weight": 0.0,
        "replay.samples_per_insert": 4.0,
        "replay.max_times_sampled": 8,
        "replay.max_policy_age": 8,
    },
    "jsd": {"recipe.student_text": "none", "recipe.loss": "generalized_jsd", "recipe.anchor_weight": 0.0},
    "kd": {
        "recipe.teacher_text": "reference",
        "recipe.student_text": "none",
        "recipe.loss": "forward_kl",
        "recipe.loss_weight": 0.5,
        "recipe.anchor_weight": 0.0,
        "recipe.lm_weight": 0.5,
    },
    "minillm": {
        "recipe.teacher_text": "none",
        "recipe.beta": 1.0,
        "recipe.loss": "reverse_kl",
        "recipe.anchor_weight": 0.0,
        "recipe.long_weight": 1.0,
        "credit.cost": "log_ratio",
        "credit.span": "all",
        "credit.cost_scale": 0.5,
        "credit.cost_max": 100.0,
        "credit.normalize": "length",
        "credit.baseline": "whiten",
        "credit.ppo_clip": 0.2,
    },
    "opd": {
        "recipe.teacher_text": "none",
        "recipe.loss_weight": 0.0,
        "recipe.anchor_weight": 0.0,
        "recipe.long_weight": 1.0,
        "credit.cost": "log_ratio",
        "credit.span": "own",
        "credit.normalize": "none",
        "credit.baseline": "none",
        "credit.ratio_max": None,
    },
    "oracle_skl": {"critic.form": "closed_form"},
    "oracle_tv": {"critic.form": "sign"},
    "random_critic": {
        "critic.features": "teacher",
        "critic.start": "random",
        "critic.num_steps": 1,
        "critic.learning_rate": 0.0,
    },
    "seqkd": {
        "recipe.student_text": "none",
        "recipe.loss_weight": 0.0,
        "recipe.anchor_weight": 0.0,
        "recipe.lm_weight": 1.0,
    },
    "sft": {
        "recipe.teacher_text": "reference",
        "recipe.student_text": "none",
        "recipe.loss_weight": 0.0,
        "recipe.anchor_weight": 0.0,
        "recipe.lm_weight": 1.0,
    },
    "triangular": {"critic.form": "closed_form", "critic.zero_sum": True},
}


def settings(recipe: str) -> dict[str, object]:
    return flat_settings(load_config(None, [*OVERRIDES, f"recipe={recipe}"], PRESETS))


def test_the_defaults_are_those_of_ammd() -> None:
    ammd = settings("ammd")
    assert {name: ammd[name] for name in DEFAULTS} == DEFAULTS


def test_every_preset_has_an_entry() -> None:
    assert sorted(DIFFERENCES) == sorted(path.stem for path in (PRESETS / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", DIFFERENCES)
def test_a_preset_differs_from_ammd_in_these_settings(recipe: str) -> None:
    ammd, found = settings("ammd"), settings(recipe)
    changed = {name: value for name, value in found.items() if value != ammd[name]}
    assert changed.pop("recipe.name", "ammd") == recipe
    assert changed == DIFFERENCES[recipe]


@pytest.mark.parametrize("name", [path.stem for path in (PRESETS / "recipes").glob("*.yaml")])
def test_each_recipe_loads_under_its_own_name(load, name):
    assert load(STUDENT, [f"recipe={name}"]).recipe.name == name


def test_settings_of_the_main_recipes(load):
    ammd = load(STUDENT + "recipe: ammd")
    assert ammd == load(STUDENT)
    paper = load(STUDENT + "recipe: ammd_paper")
    assert paper.recipe == RecipeConfig(name="ammd_paper", beta=0.5, anchor_weight=0.1, long_weight=1.0)
    assert (ammd.critic.features, paper.critic.features) == ("ratio", "teacher")
    kd, gkd = load(STUDENT + "recipe: kd").recipe, load(STUDENT + "recipe: gkd").recipe
    assert (kd.teacher_text, kd.student_text, kd.loss, kd.loss_weight, kd.lm_weight, kd.anchor_weight) == (
        "reference", "none", "forward_kl", 0.5, 0.5, 0.0,
    )  # fmt: skip
    assert (gkd.teacher_text, gkd.student_text, gkd.student_fraction, gkd.loss, gkd.jsd_beta) == (
        "reference", "mixed", 0.5, "generalized_jsd", 0.5,
    )  # fmt: skip
    assert gkd.anchor_weight == 0.0


def test_the_demo_uses_its_corpus_in_whole_epochs():
    config = load_config(PRESETS / "demo.yaml", (), PRESETS)
    assert config.run_dir == "runs/demo"
    drawn = config.learner.num_updates * config.learner.teacher_rows_per_update
    assert config.corpus.num_prompts and drawn % config.corpus.num_prompts == 0  # whole epochs


def test_each_line_of_a_recipe_has_a_comment():
    for path in (PRESETS / "recipes").glob("*.yaml"):
        for line in path.read_text().splitlines():
            assert line.startswith("#") or line.endswith(":") or "  # " in line, f"{path.name}: {line}"
