"""Documents that are written from code, and code that documents name, agree."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deploy.cli.main import parser
from deploy.config_docs import config_docs
from deploy.report.render import markdown
from deploy.study.tables.study_report import study_report

ROOT = Path(__file__).parents[2]


def test_configuration_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == config_docs()


def test_every_command_in_the_readme_parses() -> None:
    readme = (ROOT / "README.md").read_text()
    lines = re.findall(r"^\.venv/bin/distill ([^#\n]+)", readme, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        parser().parse_args(line.split())


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} names {target}"


@pytest.mark.parametrize("folder", sorted((ROOT / "docs" / "results").iterdir()), ids=lambda path: path.name)
def test_committed_reports_are_what_their_results_say(folder: Path):
    """And the page that tells of them names the code that they are of."""
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
def test_what_the_page_says_of_a_recipe_is_in_the_report(section: str, study: str):
    """Numbers of four digits in a table's row are in the rows of that recipe."""
    page = (ROOT / "docs" / "results.md").read_text().replace("\u2212", "-")
    told = page[page.index(f"## {section}") :].split("\n## ")[0]
    lines = (ROOT / "docs" / "results" / study / "report.md").read_text().splitlines()
    rows = [line for line in told.splitlines() if line.startswith("| `")]
    assert rows
    for row in rows:
        recipe = row.split("`")[1]
        reported = " ".join(line for line in lines if line.startswith(f"| `{recipe}` |"))
        for number in re.findall(r"\d\.\d{4}", row):
            assert number in reported, f"{recipe}: {number}"
