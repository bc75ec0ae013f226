"""`distill completion`: the script with which a shell completes commands, options, names and paths.

The script is made once from the parser of the command line and starts no Python when a key is pressed, so it knows the
recipes and benchmarks of the version that wrote it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from deploy.benchmarks.registry import BENCHMARKS
from deploy.fetch import DATA, MODELS
from deploy.recipes import read_recipes

_FILES = ("baseline", "config", "data", "earlier", "file", "html", "json", "study")
_FOLDERS = ("compare", "measured", "model", "out", "resume", "run_dir", "runs")
"""Arguments that are paths, by the names under which the parser keeps them."""


def completion_script(root: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell. ``root``: the parser of `distill`, which is used up: no arguments can be parsed with it."""
    import shtab

    for command, parser in _parsers(root, ""):
        for action in parser._actions:
            if names := _names(command, action.dest):
                action.choices = names
            elif action.dest in _FILES + _FOLDERS:
                complete: Any = shtab.FILE if action.dest in _FILES else shtab.DIRECTORY
                action.complete = complete  # type: ignore[attr-defined]
    return shtab.complete(root, shell)


def _parsers(parser: argparse.ArgumentParser, command: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser below ``parser``, with its command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                own = f"{command} {name}".strip()
                yield own, inner
                yield from _parsers(inner, own)


def _names(command: str, argument: str) -> list[str]:
    """The names that an argument can have; empty where they are not known."""
    match command, argument:
        case ("recipes", "name") | ("init", "recipe"):
            return list(read_recipes())
        case "bench", "name":
            return list(BENCHMARKS)
        case "models fetch", "name":
            return list(MODELS)
        case "data fetch", "name":
            return list(DATA)
    return []
