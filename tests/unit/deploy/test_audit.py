"""The ledger of a run, and what is wrong with one that does not add up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.report.audit import LedgerWrong, audit
from distill.config import RunConfig
from distill.errors import ConfigError
from distill.interfaces import Lease
from distill.run.folder import RunFolder
from distill.run.ledger_file import LedgerFile
from tests.unit.replay.builders import Settings, fill, open_index

NUM_UPDATES = 6


def leases(settings: Settings) -> list[Lease]:
    """Those of an index that makes every update once."""
    index = open_index(**vars(settings))
    found: list[Lease] = []
    for update in range(settings.num_updates):
        fill(index, version=update + 1)
        lease = index.lease(update)
        assert lease is not None
        index.acknowledge(update)
        index.advance(update + 1, update + 2)
        found.append(lease)
    return found


def ledger(path: Path, settings: Settings, *, backs: dict[int, int] | None = None) -> RunFolder:
    """A ledger whose run went back to a checkpoint after some updates. ``backs``: update -> update of the checkpoint."""
    folder = RunFolder(path)
    file = LedgerFile(
        folder.ledger, 1, {"student_text": settings.num_prompts, "teacher_text": settings.num_teacher_rows}
    )
    file.start(0)
    done, planned, backs = 0, leases(settings), dict(backs or {})
    while done < settings.num_updates:
        file.update(done + 1, planned[done])
        done += 1
        if done in backs:
            done = backs.pop(done)
            file.start(done)
    file.close()
    return folder


def settings(**changes: Any) -> Settings:
    return Settings(num_updates=NUM_UPDATES, **changes)


def of(folder: RunFolder, chosen: Settings) -> Any:
    config: RunConfig = chosen.config
    return audit(folder, config, None)


@pytest.mark.parametrize(
    "chosen", [settings(), settings(max_policy_age=0), settings(max_policy_age=2, max_times_sampled=2, samples_per_insert=2.0)],
    ids=["in order", "in turns", "re-used"],
)  # fmt: skip
def test_a_run_that_went_back_to_checkpoints_adds_up(tmp_path: Path, chosen: Settings) -> None:
    folder = ledger(tmp_path, chosen, backs={3: 2, 5: 1, 2: 0})
    found = of(folder, chosen)
    assert (found.num_updates, found.num_starts, found.num_undone, found.num_broken) == (NUM_UPDATES, 4, 7, 0)
    assert found.used == {"student_text": 2 * NUM_UPDATES, "teacher_text": 2 * NUM_UPDATES}


def test_the_lines_claim_what_was_checked(tmp_path: Path) -> None:
    chosen = settings(max_policy_age=2, max_times_sampled=2, samples_per_insert=2.0)
    lines = of(ledger(tmp_path / "sampled", chosen), chosen).lines
    assert lines[-1].startswith("no student draw was used more than 2 times")
    lines = of(ledger(tmp_path / "in order", settings(), backs={3: 2}), settings()).lines
    assert lines == [
        "6 updates, 2 starts of the training, 1 updates made again",
        "student_text: 12 draws used, 0 of them issued more than once",
        "teacher_text: 12 draws used, 0 of them issued more than once",
        "every draw adds up",
    ]


def test_what_the_replay_knew_last_is_counted_by_state(tmp_path: Path) -> None:
    folder = ledger(tmp_path, settings())
    counts = {
        "replay/student_text.trained": [4.0, 8.0],
        "replay/student_text.drawn": [2.0, 3.0],
        "replay/bytes": [1.0, 1.0],
    }
    pq.write_table(pa.table({"update": [1, 2], **counts}), folder.metrics)
    found = of(folder, settings())
    assert found.states == {"student_text": {"drawn": 3, "trained": 8}}
    assert "student_text in the replay at the last update: 3 drawn, 8 trained" in found.lines


def test_the_history_of_a_wrong_draw_contains_what_was_undone(tmp_path: Path) -> None:
    folder = ledger(tmp_path, settings(), backs={3: 2})
    lines = folder.ledger.read_text().splitlines()
    lines = change(5, lambda entry: entry["student_text"][0].__setitem__(1, 99))(lines)
    folder.ledger.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        LedgerWrong,
        match=r"=used in update 3 \(row \d, issue 0\), in start 1; update 3 undone by a return to update 2, in start 1; "
        r"used in update 3 \(row 99, issue 0\), in start 1 must select row",
    ):
        of(folder, settings())


def change(number: int, alter: Callable[[dict[str, Any]], object]) -> Callable[[list[str]], list[str]]:
    """Alter the line of an update."""

    def changed(lines: list[str]) -> list[str]:
        entry = json.loads(lines[number])
        alter(entry)
        return [*lines[:number], json.dumps(entry), *lines[number + 1 :]]

    return changed


BREAKS: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "an update is missing": (lambda lines: lines[:3] + lines[4:], r"^update=3 must be in the ledger"),
    "an update is there twice": (lambda lines: [*lines, lines[2]], r"^update=2 must be in the ledger once"),
    "a draw is skipped": (
        change(2, lambda entry: entry["student_text"].pop()),
        r"^draw 3 of student_text=never used must be used in update 2$",
    ),
    "a draw is used again": (
        change(3, lambda entry: entry["student_text"].append([1, 0, 0])),
        r"^draw 1 of student_text=used in update 1 .*; used in update 3 .* must not be used in update 3",
    ),
    "a draw is used twice in one update": (
        change(2, lambda entry: entry["student_text"].append(entry["student_text"][0])),
        r"^draw 2 of student_text=.* must be used once in update 2",
    ),
    "a draw selects another row": (
        change(1, lambda entry: entry["student_text"][0].__setitem__(1, entry["student_text"][0][1] + 1)),
        r"^draw 0 of student_text=.* must select row \d+ \(update 1 used row \d+\)",
    ),
    "a row of teacher text is skipped": (
        change(4, lambda entry: entry["teacher_text"].pop(0)),
        r"^draw 6 of teacher_text=.* must be used in update 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_the_first_draw_that_does_not_add_up_is_shown_with_its_history(tmp_path: Path, name: str) -> None:
    folder = ledger(tmp_path, settings())
    alter, message = BREAKS[name]
    folder.ledger.write_text("\n".join(alter(folder.ledger.read_text().splitlines())) + "\n")
    with pytest.raises(LedgerWrong, match=message):
        of(folder, settings())


def test_a_draw_that_is_re_used_too_often_is_shown(tmp_path: Path) -> None:
    chosen = settings(max_policy_age=2, max_times_sampled=2, samples_per_insert=2.0)
    folder = ledger(tmp_path, chosen)
    lines = folder.ledger.read_text().splitlines()
    first = json.loads(lines[1])["student_text"]
    for number in (2, 3):
        lines = change(number, lambda entry: entry.update(student_text=first))(lines)
    folder.ledger.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerWrong, match=r"must be used at most replay\.max_times_sampled=2 times"):
        of(folder, chosen)


def test_a_line_that_a_crash_cut_is_counted(tmp_path: Path) -> None:
    folder = ledger(tmp_path, settings())
    with folder.ledger.open("a") as file:
        file.write('{"update": 7, "student_te\n\x00\xff[]\n')
    assert of(folder, settings()).num_broken == 2


def test_without_a_ledger_there_is_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^ledger=.*ledger\.jsonl must be readable .*; audit a run that has trained$"
    ):
        of(RunFolder(tmp_path), settings())


def test_the_command_refuses_what_is_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.cli.main", "audit", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "must be the folder of a run" in done.stderr and "Traceback" not in done.stderr
