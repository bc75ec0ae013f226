"""Documents agree with the code: generated pages, commands, links and reported numbers."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cli.main import parser
from deploy.config_docs import config_docs
from deploy.recipes import read_recipes
from deploy.report.render import markdown
from deploy.study.tables.study_report import study_report

ROOT = Path(__file__).parents[2]


def test_configuration_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == config_docs()


def commands(page: Path) -> list[list[str]]:
    """The `distill` lines of a page's code blocks, as arguments."""
    lines = re.findall(r"^(?: {4})?(?:\.venv/bin/)?distill ([^#>\n]+)", page.read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize(
    ("page", "at_least"),
    [
        ("README.md", 7),
        ("docs/cluster.md", 4),
        ("docs/recipes.md", 4),
        ("docs/results.md", 7),
        ("docs/studies.md", 1),
        ("docs/performance.md", 4),
        ("docs/monitoring.md", 1),
        ("docs/tuning.md", 3),
        ("docs/plan.md", 4),
        ("docs/tracking.md", 2),
        ("docs/trace.md", 2),
        ("docs/reliability.md", 1),
    ],
)
def test_every_command_in_the_docs_parses(page: str, at_least: int) -> None:
    found = commands(ROOT / page)
    assert len(found) >= at_least
    for arguments in found:
        if arguments == ["--version"]:  # it prints and exits while it is parsed
            continue
        options = parser().parse_args(arguments)
        if arguments[0] in ("init", "recipes"):
            assert (getattr(options, "recipe", None) or options.name or "ammd") in read_recipes()
        if arguments[0] == "study":
            assert (ROOT / options.study).is_file()


def test_no_other_page_has_commands_that_are_not_tested() -> None:
    tested = {
        "cluster.md", "faq.md", "monitoring.md", "performance.md", "plan.md", "recipes.md", "reliability.md", "results.md",
        "studies.md", "trace.md", "tracking.md", "tuning.md",
    }  # fmt: skip
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if commands(page) and page.name not in tested
    ] == []


def test_the_readme_names_every_recipe() -> None:
    """Except for the oracles and controls, which it mentions as a group."""
    (part,) = re.findall(
        r"^- \*\*Recipes\*\*:.*?(?=^- \*\*)", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    named = set(re.findall(r"`(\w+)`", part))
    controls = {"anchor_only", "oracle_skl", "oracle_tv", "random_critic", "triangular"}
    assert named == read_recipes().keys() - controls


def test_links_between_documents_have_targets() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} names {target}"


@pytest.mark.parametrize("folder", sorted((ROOT / "docs" / "results").iterdir()), ids=lambda path: path.name)
def test_committed_reports_match_their_results(folder: Path):
    """The results page must name the hash of the code that produced them as well."""
    results = json.loads((folder / "results.json").read_text())
    assert markdown(study_report(results)) == (folder / "report.md").read_text()
    assert f"`{results['method_hash']}`" in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize(
    ("section", "study"),
    [
        ("A teacher with probabilities", "tiny"),
        ("German to English", "translation"),
        ("The same from a weak start", "weak"),
        ("A strong divergence", "lead"),
    ],
)
def test_numbers_on_the_results_page_are_in_the_report(section: str, study: str):
    """Every number with four decimals in a table row must be in the report's rows of that recipe."""
    page = (ROOT / "docs" / "results.md").read_text().replace("\u2212", "-")
    part = page[page.index(f"## {section}") :].split("\n## ")[0]
    lines = (ROOT / "docs" / "results" / study / "report.md").read_text().splitlines()
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    assert rows
    for row in rows:
        recipe = row.split("`")[1]
        reported = " ".join(line for line in lines if line.startswith(f"| `{recipe}` |"))
        for number in re.findall(r"\d\.\d{4}", row):
            assert number in reported, f"{recipe}: {number}"


# Prose: the phrases that CONTRIBUTING's rules ban, wherever a text of the project stands.

PACKAGES = ("distill", "actors", "learner", "deploy", "tests")
BANNED = [
    r"another than", r"another one than", r"so many", r"hangs? on\b", r"\bmend(s|ed|ing)?\b", r"\bbe had\b",
    r"(go|goes|going|went) on with", r"\bnobody\b", r"\bwhoever\b", r"\b(is|are|was|were|be) told\b",
    r"\b(is|are|was|were|be) said\b", r"\b(is|are|was|were) asked\b", r"for want of", r"what it is of",
    r"by heart", r"come to be", r"in the place of", r"takes? the way of", r"\bat an end\b", r"is none\b",
    r"of a teacher of text", r"as one likes",
]  # fmt: skip
"""Regular expressions, compared without case; what to write instead: CONTRIBUTING.md, "Prose"."""
_BANNED = re.compile("|".join(f"(?:{phrase})" for phrase in BANNED), re.IGNORECASE)
_EXEMPT = {"CONTRIBUTING.md", "tests/unit/test_docs.py"}
"""They quote the phrases."""


def documents() -> list[Path]:
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "deploy").rglob("*.yaml"),
        *(ROOT / "deploy").rglob("*.j2"),
    ]
    return sorted(path for path in pages if str(path.relative_to(ROOT)) not in _EXEMPT)


def modules() -> list[Path]:
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in found if str(path.relative_to(ROOT)) not in _EXEMPT)


def texts(source: str) -> Iterator[tuple[int, str]]:
    """The line and the text of every string and comment; neighbouring parts of one string are joined."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if comments and comments[-1][0] == line - 1:
                comments[-1] = (line, f"{comments[-1][1]} {token.string.lstrip('# ')}")
            else:
                comments.append((line, token.string))
    yield from comments


def found(text: str) -> list[str]:
    return [match[0] for match in _BANNED.finditer(" ".join(text.split()))]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_have_no_banned_phrase(path: Path):
    assert found(path.read_text()) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_in_code_have_no_banned_phrase(path: Path):
    wrong = {(line, phrase) for line, text in texts(path.read_text()) for phrase in found(text)}
    assert sorted(wrong) == []


def test_every_banned_phrase_is_found_wherever_it_stands():
    source = 'A = f"the engine {x} hangs " "on"\n\n\ndef f():\n    """Nobody knows."""\n    # go on\n    # with it\n'
    assert {phrase for _, text in texts(source) for phrase in found(text)} == {
        "hangs on",
        "Nobody",
        "go on with",
    }


def test_contributing_explains_the_rules_with_examples():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    prose = page[page.index("## Prose") :]
    assert prose.count("before:") == prose.count("after:") >= 5
