"""CONTRIBUTING's prose rules, as far as a machine can check them: phrases that no text of the project has.

Read are the documents, and in the code all docstrings, documentation of settings, messages and comments.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
_EXEMPT = {"CONTRIBUTING.md", "tests/unit/test_prose.py"}
"""They quote the phrases."""


def documents() -> list[Path]:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.yaml")]
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
