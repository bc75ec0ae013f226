"""Every code block of the documents says what it is, is right, and is run where that is cheap.

The words after the fence are a language and a tag: ``sh``, ``python``, ``yaml`` or ``json`` with ``run`` (it is run
here), ``parse`` (it is checked without running) or ``gpu`` (likewise, because it needs a GPU); ``text`` with ``show`` (it
is only looked at) or ``message`` (an error, which the test of the FAQ compares with the code).
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from deploy import PRESETS
from deploy.benchmarks.registry import BENCHMARKS
from deploy.cli.main import parser
from deploy.study.spec import load_study
from distill.config import RunConfig
from distill.config.load import load_config
from distill.config.tree import flat_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TAGS = {"text": ("show", "message")} | dict.fromkeys(
    ("sh", "python", "yaml", "json"), ("run", "parse", "gpu")
)
TAKES_AT_MOST_S = 120
"""Much more than a block that is run here may take on a quiet machine."""
_OTHER_PROGRAMS = ("export", "ray")


@dataclass(frozen=True)
class CodeBlock:
    page: str
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def tag(self) -> str:
        return self.info.partition(" ")[2]


def blocks_of(page: Path) -> Iterator[CodeBlock]:
    text = page.read_text()
    for found in re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start()) + 1
        yield CodeBlock(str(page.relative_to(ROOT)), line, found[2].strip(), found[3])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(language: str, *tags: str) -> list[CodeBlock]:
    return [block for block in BLOCKS if block.language == language and block.tag in tags]


def test_every_block_has_a_language_and_a_tag():
    assert len(BLOCKS) > 50
    wrong = [f"{block}: {block.info!r}" for block in BLOCKS if block.tag not in TAGS.get(block.language, ())]
    assert wrong == []
    for page in PAGES:
        assert page.read_text().count("```") == 2 * len(list(blocks_of(page))), page.name


def test_no_block_is_only_indented():
    """Such a block has no language and no tag."""
    for page in PAGES:
        text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"(?:^|\n)(?![ ]*[-*\d])[^\n]*\n\n {4}\S", text), page.name


def commands(block: CodeBlock) -> Iterator[list[str]]:
    """The words of each command, without variables before it, and redirections and comments after it."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words[: words.index(">")] if ">" in words else words


@pytest.mark.parametrize("block", of("sh", "run", "parse", "gpu"), ids=str)
def test_shell_blocks_are_right(block: CodeBlock):
    assert subprocess.run(["bash", "-n"], input=block.text, text=True).returncode == 0
    for program, *arguments in commands(block):
        program = program.removeprefix(".venv/bin/")
        match program:
            case "distill":
                check_distill(arguments)
            case "make":
                check_make(arguments)
            case "python" if arguments[0] == "-m":
                check_module(arguments[1])
            case _:
                assert program in _OTHER_PROGRAMS, program


def check_distill(arguments: list[str]) -> None:
    """The arguments parse, and the settings, recipes, studies and benchmarks that they name exist."""
    if arguments == ["--version"]:  # it prints and exits while it is parsed
        return
    options = parser().parse_args(arguments)
    settings = [text for text in getattr(options, "overrides", []) if "=" in text]
    if arguments[0] == "init":
        settings.append(f"recipe={options.recipe}")
    if arguments[0] == "recipes" and options.name:
        settings.append(f"recipe={options.name}")
    check_settings(settings)
    if arguments[0] == "study":
        assert (ROOT / options.study).is_file()
    if arguments[0] == "bench" and options.name:
        assert options.name in BENCHMARKS
        assert options.baseline is None or (ROOT / options.baseline).parent.is_dir()


def check_settings(settings: list[str]) -> None:
    """Each loads on top of the demo's configuration; values in capitals stand for the reader's own."""
    given = [text for text in settings if not text.partition("=")[2].isupper()]
    assert load_config(PRESETS / "demo.yaml", given, PRESETS)
    names = flat_settings(RunConfig())
    assert all(text.partition("=")[0] in names for text in settings if text not in given)


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "ARGS":
            check_settings(shlex.split(value))
        elif name == "NAMES":
            assert set(value.split()) <= set(BENCHMARKS)
        else:
            assert re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE), name


def check_module(name: str) -> None:
    place = ROOT / name.replace(".", "/")
    assert name == "pytest" or place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), name


@pytest.mark.parametrize("block", of("yaml", "run", "parse", "gpu"), ids=str)
def test_yaml_blocks_load(block: CodeBlock, tmp_path: Path):
    """A block is a configuration, or a part of a study; both loaders reject names that they do not know."""
    tree = yaml.safe_load(block.text)
    file = tmp_path / "block.yaml"
    if "recipes" in tree:
        file.write_text(yaml.safe_dump({"name": "block", "task": "tiny-wiki", "seeds": [0]} | tree))
        for name, settings in load_study(file).recipes.items():
            values = {"recipe": name, **settings}
            values.pop("tuned_as", None)
            check_settings([f"{key}={value}" for key, value in values.items()])
    else:
        file.write_text(block.text)
        assert load_config(file, (), PRESETS)


@pytest.mark.parametrize("block", [*of("json", "parse"), *of("python", "run", "parse", "gpu")], ids=str)
def test_json_and_python_blocks_parse(block: CodeBlock):
    (json.loads if block.language == "json" else ast.parse)(block.text)


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder in which the commands of a checkout work and write nothing into this one, and their environment."""
    for name in ("docs", "deploy", "benchmarks", "distill", "actors", "learner", ".git"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    programs = tmp_path / ".venv" / "bin"
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return tmp_path, {**environment, "DISTILL_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}


@pytest.mark.parametrize("block", of("sh", "run"), ids=str)
def test_shell_blocks_run(block: CodeBlock, checkout: tuple[Path, dict[str, str]]):
    folder, environment = checkout
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TAKES_AT_MOST_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    made = [path for path in folder.iterdir() if path.is_file()]
    assert done.stdout or (made and all(path.stat().st_size for path in made))


@pytest.mark.parametrize("block", of("python", "run"), ids=str)
def test_python_blocks_print_what_they_say(block: CodeBlock, checkout: tuple[Path, dict[str, str]]):
    folder, environment = checkout
    done = subprocess.run(
        [sys.executable, "-c", block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=TAKES_AT_MOST_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^# prints: (.*)$", block.text, re.MULTILINE)
    assert said and done.stdout.splitlines() == said


def test_some_blocks_of_the_main_pages_are_run():
    assert {block.page for block in of("sh", "run")} >= {
        "README.md",
        "docs/recipes.md",
        "docs/performance.md",
    }
