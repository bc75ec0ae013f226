"""The messages in docs/faq.md are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from deploy.cli.main import main
from tests.unit.test_doc_blocks import BLOCKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faq.md").read_text()
MESSAGES = [block.text.strip() for block in BLOCKS if block.page == "docs/faq.md" and block.tag == "message"]


def texts() -> Iterator[str]:
    """The strings of the code, with … for what is put into them."""
    for package in ("distill", "actors", "learner", "deploy"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    yield "".join(map(str, parts))


TEXTS = list(dict.fromkeys(text for text in texts() if " " in text))


def parts(message: str) -> Iterator[list[str]]:
    """The rule and the remedies of a message, in each way in which it can be taken apart."""
    _, must, rest = message.partition(" must ")
    pieces = rest.split("; ") if must else [message]
    for joins in product((True, False), repeat=len(pieces) - 1):
        found = [pieces[0]]
        for piece, together in zip(pieces[1:], joins, strict=True):
            found = [*found[:-1], f"{found[-1]}; {piece}"] if together else [*found, piece]
        yield found


def is_in_the_code(part: str) -> bool:
    """A value may be quoted in place of the …, but every other word is the code's."""
    pattern = re.compile(".+".join(map(re.escape, part.split("…"))), re.DOTALL)
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_every_message_is_one_that_the_code_can_raise(message: str):
    assert any(all(map(is_in_the_code, found)) for found in parts(message)), message


def test_a_message_of_no_code_is_noticed():
    assert not is_in_the_code("be the teacher's best friend")
    assert not any(all(map(is_in_the_code, found)) for found in parts("x=… must be new; bake a cake"))


def test_the_page_has_an_entry_for_each_message_with_cause_and_remedy():
    entries = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    assert len(entries) == len(MESSAGES) >= 20
    for entry in entries:
        heading, _, rest = entry.partition("\n")
        after = rest.rpartition("```")[2].partition("\n## ")[0]
        assert len(after.split()) >= 10, heading


@pytest.mark.parametrize(
    ("arguments", "heading"),
    [
        (["train", "deploy/configs/demo.yaml", "learner.num_update=3"], "A setting is not known"),
        (["train", "deploy/configs/demo.yaml", "cluster.address=http://head:8265"], "The address is that of the dashboard"),
        (["report", "docs"], "The path is no run"),
    ],
)  # fmt: skip
def test_what_a_user_sees_is_on_the_page(
    arguments: list[str], heading: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    entry = PAGE[PAGE.index(f"### {heading}\n") :]
    message = re.search(r"```text message\n(.*?)\n```", entry, re.DOTALL)
    assert message is not None
    assert re.search(".*".join(map(re.escape, message[1].split("…"))), shown), shown
