"""What differs between runs, and whether that forbids to compare what they measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from deploy.report.model import Column, Line, Table, Tone, Toned
from deploy.report.run_files import READ_ERRORS, RunFiles
from deploy.safe_text import strip_control
from distill.run.folder import HELDOUT_PROMPTS

LONGEST_NAME, LONGEST_VALUE = 24, 60
"""Characters of a run's name, and of a value, that are shown."""
_ALWAYS_OTHER = ("run_dir",)
_DECISIVE = (
    ("The data differ", ("data.",)),
    ("The teachers differ", ("teacher.",)),
    ("The longest texts that are measured differ", ("corpus.max_new_tokens", "rollout.max_new_tokens")),
)
"""What runs must have in common to be compared, and the beginnings of the settings that decide it."""
_NOT_RECORDED = object()


@dataclass(frozen=True)
class Compared:
    """A run of a comparison, with the letter that stands for it."""

    letter: str
    run: RunFiles

    @property
    def label(self) -> str:
        """The letter and the name of the folder, on one line."""
        name = " ".join(strip_control(self.run.folder.path.name).split())
        return f"{self.letter} {_cut(name, LONGEST_NAME)}"


def mismatches(runs: Sequence[Compared]) -> list[str]:
    """Say why measures of the runs cannot be compared, a sentence per reason; empty when they can."""
    found: list[str] = []
    if unknown := [each.letter for each in runs if not each.run.settings]:
        found.append(
            f"Whether the data and the teacher of {listed(unknown)} are those of the other runs is not known, because "
            "settings.json is missing or broken."
        )
    for reason, beginnings in _DECISIVE:
        names = [name for name in _differing(runs) if name.startswith(beginnings)]
        if names:
            found.append(f"{reason}: {'; '.join(_said(runs, name) for name in names)}.")
    return [*found, *_other_prompts(runs)]


def _other_prompts(runs: Sequence[Compared]) -> Iterator[str]:
    """Where held-out prompts of one number have different tokens, although nothing in the settings says so."""
    first, *others = ((each, _heldout_prompts(each.run)) for each in runs)
    for other, prompts in others:
        shared = first[1].keys() & prompts.keys()
        differing = sorted(number for number in shared if first[1][number] != prompts[number])
        if differing:
            yield (
                f"The prompts differ: {len(differing)} of the {len(shared)} held-out prompts that {first[0].letter} and "
                f"{other.letter} share by number have other tokens, the first of them in row {differing[0]} of the data."
            )


def _heldout_prompts(run: RunFiles) -> dict[int, list[int]]:
    """The tokens of the held-out prompts by number; empty where they cannot be read."""
    try:
        path = run.folder.data / HELDOUT_PROMPTS
        table = pq.read_table(path, columns=["prompt_index", "prompt_tokens"])
        pairs = zip(table["prompt_index"].to_pylist(), table["prompt_tokens"].to_pylist(), strict=True)
        return {number: tokens for number, tokens in pairs if isinstance(number, int)}
    except READ_ERRORS:
        return {}


def settings_table(runs: Sequence[Compared]) -> Table | None:
    """The settings that are not the same in all runs which recorded theirs; None without any."""
    names = _differing(runs)
    if not names:
        return None
    columns = (Column("setting"), *(Column(each.letter, wraps=True) for each in runs))
    rows = tuple(((name,), *(_cell(each, name) for each in runs)) for name in names)
    return Table(columns, rows, "Settings that differ", "The folders of the runs are left out.")


def versions_table(runs: Sequence[Compared]) -> Table | None:
    """The packages whose versions are not the same at the last starts of the runs; None without any."""
    versions = {each.letter: _versions(each.run) for each in runs}
    known = [found for found in versions.values() if found]
    names = sorted({name for found in known for name in found})
    names = [name for name in names if len({found.get(name) for found in known}) > 1]
    if not names:
        return None
    absent: Line = (Toned("not recorded", Tone.FAINT),)
    rows = tuple(
        (
            (name,),
            *((found[name],) if name in found else absent for found in versions.values()),
        )
        for name in names
    )
    columns = (Column("package"), *(Column(letter, wraps=True) for letter in versions))
    return Table(columns, rows, "Versions that differ")


def _versions(run: RunFiles) -> dict[str, str]:
    starts = [event.get("versions") for event in run.events if event["event"] == "started"]
    found = starts[-1] if starts else None
    if not isinstance(found, Mapping):
        return {}
    return {
        _cut(str(name), LONGEST_VALUE): _cut(str(version), LONGEST_VALUE) for name, version in found.items()
    }


def _differing(runs: Sequence[Compared]) -> list[str]:
    """The settings whose values are not the same in all runs that recorded theirs."""
    known = [each.run.settings for each in runs if each.run.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    return [
        name
        for name in sorted(names)
        if name not in _ALWAYS_OTHER and len({_written(settings, name) for settings in known}) > 1
    ]


def _said(runs: Sequence[Compared], name: str) -> str:
    """Which runs have which value, as a clause."""
    by_value: dict[str, list[str]] = {}
    for each in runs:
        if each.run.settings:
            by_value.setdefault(_shown(each.run.settings.get(name, _NOT_RECORDED)), []).append(each.letter)
    return f"{name} is {listed([f'{value} in {listed(letters)}' for value, letters in by_value.items()])}"


def _cell(each: Compared, name: str) -> Line:
    value = each.run.settings.get(name, _NOT_RECORDED)
    return (Toned(_shown(value), Tone.FAINT) if value is _NOT_RECORDED else _shown(value),)


def _written(settings: Mapping[str, Any], name: str) -> str | None:
    return json.dumps(settings[name], sort_keys=True) if name in settings else None


def _shown(value: object) -> str:
    if value is _NOT_RECORDED:
        return "not recorded"
    return _cut(value if isinstance(value, str) else json.dumps(value), LONGEST_VALUE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def listed(parts: Sequence[str]) -> str:
    """The parts as a list in a sentence."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
