"""`distill recipes` shows the files of the recipes, and docs/recipes.md agrees with them."""

from __future__ import annotations

import pytest

from deploy import PRESETS
from deploy.cli.main import main
from deploy.recipe_docs import PAGE, recipe_docs
from deploy.recipes import Recipe, read_recipes

RECIPES = read_recipes()
TEXT, NOTHING = {"ammd_blackbox", "seqkd"}, {"sft"}
ON_OWN_TEXT = {
    "ammd", "ammd_paper", "distillm2", "imitkd", "minillm", "opd", "oracle_skl", "oracle_tv", "random_critic",
    "triangular",
}  # fmt: skip
PARTLY_ON_OWN_TEXT = {"distillm", "gkd"}


def test_the_page_of_recipes_is_up_to_date() -> None:
    assert recipe_docs(PAGE.read_text()) == PAGE.read_text()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_recipe_begins_with_a_short_sentence(recipe: Recipe) -> None:
    assert recipe.description.endswith(".") and 20 < len(recipe.description) <= 105


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_needs_of_every_recipe(recipe: Recipe) -> None:
    needed = "text" if recipe.name in TEXT else "nothing" if recipe.name in NOTHING else "probabilities"
    assert recipe.teacher_must_give == needed
    own = "yes" if recipe.name in ON_OWN_TEXT else "no"
    assert recipe.uses_student_text == ("in some updates" if recipe.name in PARTLY_ON_OWN_TEXT else own)


def test_the_list_has_one_line_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines[1 : 1 + len(RECIPES)]}
    assert list(listed) == sorted(path.stem for path in (PRESETS / "recipes").glob("*.yaml"))
    for name, recipe in RECIPES.items():
        for part in (recipe.teacher_must_give, recipe.uses_student_text, recipe.description):
            assert f"  {part}" in listed[name]


def test_one_recipe_is_printed_with_its_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "jsd"]) == 0
    assert capsys.readouterr().out == (PRESETS / "recipes" / "jsd.yaml").read_text()


def test_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "amd"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distill: recipe=amd must be one of ammd, ")
    assert line.endswith("; did you mean ammd?")
