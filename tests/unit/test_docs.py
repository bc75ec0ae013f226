"""Documents agree with the code: generated pages, commands, links and reported numbers."""

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
