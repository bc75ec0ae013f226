"""The page docs/tuning.md names parts of the report, panels and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.dashboards.panels import DASHBOARDS
from deploy.report.model import Chart, Table, Timeline
from deploy.report.run_files import read_run
from deploy.report.run_page import run_page
from distill.config.tree import setting_names
from tests.unit.deploy.run_folders import run_folder

PAGE = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| in the report")
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The titles on the page of a run."""
    page = run_page(read_run(run_folder(tmp_path_factory.mktemp("run") / "run").path))
    shown = (Table, Chart, Timeline)
    blocks = [block for section in page.sections for block in section.blocks]
    return {block.title for block in blocks if isinstance(block, shown)}


def test_the_tables_name_parts_of_the_report_and_panels(parts: set[str]):
    assert len(ROWS) >= 18
    panels = {panel.title for board in DASHBOARDS for panel in board.panels}
    for part, panel, *_ in ROWS:
        assert part in parts | {"Responses that the length limit cut", "Age of the student's text"}, part
        assert panel in panels | {""}, panel


def test_every_row_names_a_setting_and_every_setting_exists():
    names = set(setting_names())
    for *_, change in ROWS:
        assert re.search(r"`[a-z_]+\.[a-z_]+", change), change
    named = re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", PAGE)
    assert len(named) > 30
    files = {"summary.json"}
    assert {name for name in named if name not in names} <= files
