"""Files and functions stay short enough to be read: CONTRIBUTING.md, "House rules"."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MODULES = [
    path
    for package in ("distill", "actors", "learner", "deploy", "tests")
    for path in sorted((ROOT / package).rglob("*.py"))
]


def test_files_are_short():
    lengths = {path: path.read_text().count("\n") for path in MODULES}
    assert {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short():
    long: dict[str, int] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = length
    assert long == {}
