"""Generates the tables of docs/recipes.md from deploy/configs/recipes/.

    python -m deploy.recipe_docs

It replaces what stands between the two marks of the page. A unit test compares the page with this output.
"""

from __future__ import annotations

from pathlib import Path

from deploy.recipes import Recipe, read_recipes
from distill.config import RunConfig
from distill.files import write_bytes

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
_BEGIN = "<!-- `python -m deploy.recipe_docs` generates the tables from deploy/configs/recipes/; do not edit them. -->"
_END = "<!-- End of the generated tables. -->"
_LOSSES = {
    "moment_gap": "moment gap",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "generalized_jsd": "generalised JSD",
    "skew_forward_kl": "skew forward KL",
    "skew_reverse_kl": "skew reverse KL",
}
_COSTS = {"moment_gap": "moment gaps", "log_ratio": "log-ratios"}
_SPANS = {"future": "later tokens", "own": "the token itself", "all": "the token and later ones"}


def recipe_docs(page: str) -> str:
    """Return the page with its tables generated anew."""
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    recipes = read_recipes().values()
    choice = _table(("recipe", "description", "the teacher must give", "uses the student's own text"), [
        (f"`{recipe.name}`", recipe.description, recipe.teacher_must_give, recipe.uses_student_text)
        for recipe in recipes
    ])  # fmt: skip
    method = _table(("recipe", "text", "main loss", "long horizon", "added terms"), [
        (f"`{recipe.name}`", *_method(recipe)) for recipe in recipes
    ])  # fmt: skip
    return f"{before}{_BEGIN}\n\n{choice}\n\n{method}\n\n{_END}{after}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _method(recipe: Recipe) -> tuple[str, str, str, str]:
    config = recipe.config
    return _text(config), _main_loss(config), _long_horizon(config), _added_terms(config)


def _text(config: RunConfig) -> str:
    recipe = config.recipe
    other = {"sampled": "teacher's", "reference": "references", "none": ""}[recipe.teacher_text]
    own = "student's, replayed" if config.replay.max_times_sampled > 1 else "student's"
    if recipe.student_text == "none":
        return other
    if recipe.student_text == "mixed":
        share = f"{recipe.student_fraction:g}"
        share = (
            f"the updates that grows from {share}" if recipe.adapts_fraction else f"{share} of the updates"
        )
        return f"{other}; {own}, in a share of {share}"
    return f"{other} and {own}, β {recipe.beta:g}" if other else own


def _main_loss(config: RunConfig) -> str:
    recipe = config.recipe
    if recipe.loss_weight == 0:
        return ""
    weight = f"{recipe.loss_weight:g} × " if recipe.loss_weight != 1 else ""
    if recipe.loss_is_game:
        return f"{weight}moment gap, {_critics(config)}"
    parameter = {"generalized_jsd": f", {recipe.jsd_beta:g}"}.get(recipe.loss, "")
    parameter = f", α {recipe.skew:g}" if recipe.loss.startswith("skew") else parameter
    other = recipe.student_text_loss
    on_own_text = f"; {_LOSSES[other]} on the student's text" if other else ""
    return f"{weight}{_LOSSES[recipe.loss]}{on_own_text}{parameter}"


def _critics(config: RunConfig) -> str:
    critic = config.critic
    if critic.form == "sign":
        return "critics B·sign(π* − π)"
    if critic.form == "closed_form":
        return f"critics B·tanh(½ log ρ){', zero-sum' if critic.zero_sum else ''}"
    learned = "learned critics" if critic.learning_rate > 0 else "frozen random critics"
    model = "the teacher" if config.recipe.teacher_gives == "probabilities" else "a proxy"
    seen = {
        "teacher": f"the features of {model}",
        "both": f"the features of {model} and of the student",
        "ratio": f"the features and the log-ratio of {model}",
    }
    return f"{learned} on {seen[critic.features]}"


def _long_horizon(config: RunConfig) -> str:
    recipe, credit = config.recipe, config.credit
    if recipe.long_weight == 0:
        return ""
    discount = "" if credit.span == "own" else f", γ {recipe.gamma:g}"
    return f"{_COSTS[credit.cost]} of {_SPANS[credit.span]}{discount}"


def _added_terms(config: RunConfig) -> str:
    recipe = config.recipe
    terms = {_LOSSES[recipe.anchor]: recipe.anchor_weight, "cross-entropy": recipe.lm_weight}
    return ", ".join(f"{weight:g} {term}" for term, weight in terms.items() if weight)


if __name__ == "__main__":
    write_bytes(PAGE, recipe_docs(PAGE.read_text()).encode())
