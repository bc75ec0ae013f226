"""The recipes that ship. Their files are the only source of `distill recipes` and of the tables in docs/recipes.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy import PRESETS
from distill.config import RunConfig
from distill.config.load import load_config
from distill.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Recipe:
    """One file of `deploy/configs/recipes/`."""

    path: Path
    config: RunConfig
    """The defaults with this recipe; teacher, student and data have no meaning."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def text(self) -> str:
        """The file with its comments."""
        return self.path.read_text()

    @property
    def description(self) -> str:
        """The first sentence of the comment at the top of the file."""
        lines = re.match(r"(?:#.*\n)+", self.text)
        comment = " ".join(line.lstrip("# ") for line in lines[0].splitlines()) if lines else ""
        return re.split(r"(?<=\.) ", comment)[0]

    @property
    def teacher_must_give(self) -> Literal["probabilities", "text", "nothing"]:
        """What the student learns from. Evaluations compute the teacher's probabilities with every recipe."""
        recipe = self.config.recipe
        if recipe.teacher_gives == "probabilities" and recipe.payload == "hidden":
            return "probabilities"
        return "text" if recipe.teacher_text == "sampled" else "nothing"

    @property
    def uses_student_text(self) -> Literal["yes", "in some updates", "no"]:
        """Whether the student learns from text that it wrote itself."""
        uses: dict[str, Literal["yes", "in some updates", "no"]]
        uses = {"none": "no", "every_update": "yes", "mixed": "in some updates"}
        return uses[self.config.recipe.student_text]


def read_recipes() -> dict[str, Recipe]:
    """All recipes by name, in alphabetical order."""
    return {path.stem: _read(path) for path in sorted((PRESETS / "recipes").glob("*.yaml"))}


def find_recipe(name: str) -> Recipe:
    """Raises: ConfigError for an unknown name."""
    recipes = read_recipes()
    if name not in recipes:
        raise ConfigError("recipe", name, f"be one of {', '.join(recipes)}", did_you_mean(name, recipes))
    return recipes[name]


def _read(path: Path) -> Recipe:
    return Recipe(path, load_config(None, [f"recipe={path.stem}", "student.model=any"], PRESETS))
