"""Runs side by side: what differs, what came of it, and what cannot be compared, from any state of their folders."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from deploy.cli.main import main
from deploy.report import html as html_module
from deploy.report.charts import description, legend
from deploy.report.compare import MOST_RUNS, comparison, comparison_report, problems, read_runs
from deploy.report.html import html
from deploy.report.model import Block, Chart, Items, Page, Series, Table, Toned, piece_text
from deploy.report.overlay import overlaid
from deploy.report.terminal import print_report
from distill.errors import ConfigError
from distill.evaluation import save_evaluation
from distill.files import write_json
from distill.run.folder import RunFolder
from tests.unit.deploy.run_folders import HOSTILE, evaluation, run_folder
from tests.unit.deploy.test_run_page import STATES, PageElements

SETTINGS = {
    "recipe.name": "ammd",
    "learner.num_updates": 60,
    "learner.learning_rate": 0.0001,
    "data.path": "/data/a.jsonl",
    "teacher.model": "smollm2-135m",
    "run_dir": "/somewhere",
}


def run(path: Path, after: float = 0.25, text: str = "Paris.", **changed: object) -> RunFolder:
    """A finished run. ``changed``: settings, with __ for the dot of their names."""
    folder = run_folder(path, text=text)
    save_evaluation(folder.evaluations, evaluation("after", after))
    settings = {name.replace("__", "."): value for name, value in changed.items()}
    write_json(folder.settings, {**SETTINGS, "run_dir": str(path), **settings})
    write_prompts(folder, [[1, 2], [3], [4, 5], [6]])
    return folder


def write_prompts(folder: RunFolder, tokens: list[list[int]]) -> None:
    folder.data.mkdir(exist_ok=True)
    table = pa.table({"prompt_index": range(len(tokens)), "prompt_tokens": tokens})
    pq.write_table(table, folder.data / "heldout.parquet")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are described instead of drawn, which takes most of the time."""
    monkeypatch.setitem(html_module._ENVIRONMENT.filters, "svg", lambda drawn, name: description(drawn))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    folder = tmp_path_factory.mktemp("runs")
    return run(folder / "one"), run(
        folder / "two", 0.2, learner__learning_rate=0.001, recipe__name="kd", run_dir="/elsewhere"
    )


def page_of(*folders: RunFolder) -> Page:
    return comparison(read_runs([folder.path for folder in folders]))


def text_of(page: Page) -> str:
    return " ".join(PageElements(html(page)).text.split())


def tables(page: Page) -> dict[str, list[list[str]]]:
    """Title -> the texts of the cells."""
    return {
        block.title: [["".join(map(piece_text, cell)) for cell in row] for row in block.rows]
        for section in page.sections
        for block in section.blocks
        if isinstance(block, Table)
    }


def test_what_the_page_of_two_runs_shows(both: tuple[RunFolder, RunFolder]):
    page = page_of(*both)
    assert [section.title for section in page.sections] == [
        "Runs", "Settings", "Before and after", "Answers", "Learning curves", "Stages", "Cost", "Alarms",
    ]  # fmt: skip
    found = tables(page)
    assert found["Settings that differ"] == [
        ["learner.learning_rate", "0.0001", "0.001"],
        ["recipe.name", "ammd", "kd"],
    ]
    first, second = found["Before and after"][:2]
    assert first[:2] == ["TV, teacher's text", "A one"] and second[:2] == ["TV, teacher's text", "B two"]
    assert first[4].startswith("-0.2504* [-0.2") and first[5] == "↓ better"
    assert first[2].startswith("0.50") and "±" in first[2]
    between = found["After training, compared with A one"]
    assert between[0][:2] == ["TV, teacher's text", "B two"]
    assert between[0][2].startswith("-0.0501* [-0.0") and between[0][3] == "↓ better"
    cost = {row[0]: row[1:] for row in found["Cost"]}
    assert cost["minutes in all"] == ["8.0", "8.0"] and cost["tokens: learner"] == ["234,567"] * 2
    assert cost["limiting stage"][0] in ("rollout", "learner")
    assert found["Alarms"][0] == ["A one", "30", "critic/teacher_text.tightness is 0.40"]
    text = text_of(page)
    assert "B two is 20 % nearer to the teacher" in text
    assert "A one: No stage is busy all the time (the learner most, 56 %)" in text
    assert "Not comparable" not in text


def test_the_page_is_one_file_that_loads_nothing_and_can_be_read_without_seeing_it(
    both: tuple[RunFolder, RunFolder],
):
    text = html(page_of(*both))
    elements = PageElements(text)
    assert not {tag for tag, _ in elements.found} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "img",
        "form",
    }
    assert not any(name.startswith("on") or name == "src" for _, found in elements.found for name in found)
    ids = [found["id"] for _, found in elements.found if "id" in found]
    assert len(ids) == len(set(ids))
    assert len(elements.of("caption")) == len(elements.of("table"))
    assert len(text) < 1_000_000


def test_curves_are_overlaid_with_one_series_per_run(both: tuple[RunFolder, RunFolder]):
    (curves,) = [section for section in page_of(*both).sections if section.title == "Learning curves"]
    charts = [block for block in curves.blocks if isinstance(block, Chart)]
    titles = [chart.title for chart in charts]
    assert len(titles) == len(set(titles)) > 15
    assert "Held-out total variation: teacher's text" in titles and "Student's loss" in titles
    for chart in charts:
        assert [series.label for series in chart.series] == ["A one", "B two"]


def test_a_run_looks_the_same_in_every_chart():
    def chart(title: str, *labels: str) -> Chart:
        return Chart(title, "u", tuple(Series(label, (1.0,), (2.0,)) for label in labels))

    every = {f"run {number}": [chart("t", "x")] for number in range(MOST_RUNS)}
    (together,) = overlaid(every)
    looks = {(entry.number, entry.dashes) for entry in legend(together)}
    assert len(looks) == MOST_RUNS
    alone, shared, other = overlaid({"one": [chart("t", "x")], "two": [chart("t", "y"), chart("s", "z")]})[:3]
    assert (alone.title, shared.title, other.title) == ("t: x", "t: y", "s")
    assert legend(shared)[0].number == legend(other)[0].number == 2


def test_answers_to_the_same_prompts_are_side_by_side(tmp_path: Path):
    folders = [run(tmp_path / name, text="Paris.") for name in ("one", "two")]
    answers = [("Why?", "So.", "x"), ("How?", "Thus.", "y")]
    for folder, kept in zip(folders, (answers, answers[:1]), strict=True):
        for label in ("before", "after"):
            rows = [
                {"prompt": p, "teacher": t, "student": s if label == "before" else f"{s} {folder.path.name}"}
                for p, t, s in kept
            ]
            (folder.evaluations / f"{label}-answers.json").write_text(json.dumps(rows))
    (section,) = [each for each in page_of(*folders).sections if each.title == "Answers"]
    sample, left_out = section.blocks
    assert getattr(sample, "prompt", None) == "Why?"
    assert getattr(sample, "answers", None) == (
        ("teacher", "So."),
        ("student before", "x"),
        ("student after, A one", "x one"),
        ("student after, B two", "x two"),
    )
    assert "only one run has are left out: 1" in str(left_out)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"data__path": "/data/b.jsonl"},
            "The data differ: data.path is /data/a.jsonl in A and /data/b.jsonl in B.",
        ),
        (
            {"teacher__model": "other"},
            "The teachers differ: teacher.model is smollm2-135m in A and other in B.",
        ),
        (
            {"corpus__max_new_tokens": 8},
            "texts that are measured differ: corpus.max_new_tokens is not recorded in A and 8 in B.",
        ),
    ],
)
def test_runs_that_are_not_comparable_are_shown_with_a_warning(
    changed: dict[str, object], said: str, tmp_path: Path, undrawn: None
):
    page = page_of(run(tmp_path / "one"), run(tmp_path / "two", **changed))
    assert page.sections[0].title == "Not comparable"
    assert said in text_of(page)
    assert "cannot be compared" in "".join(map(piece_text, page.lead))
    found = tables(page)
    assert "Before and after" in found and not any(title.startswith("After training") for title in found)
    (warnings,) = page.sections[0].blocks
    assert isinstance(warnings, Items) and isinstance(warnings.lines[0][0], Toned)


def test_an_edited_data_file_is_noticed(tmp_path: Path, undrawn: None):
    one, two = run(tmp_path / "one"), run(tmp_path / "two")
    write_prompts(two, [[1, 2], [3], [9], [6]])
    assert "1 of the 4 held-out prompts that A and B share by number have other tokens" in text_of(
        page_of(one, two)
    )


def test_another_number_of_cores_is_noticed(tmp_path: Path, undrawn: None):
    folders = [run(tmp_path / name) for name in ("one", "two")]
    for folder, cores in zip(folders, (2, 8), strict=True):
        setup = {"max_policy_age": 2, "num_cores": cores, "num_threads": {"learner": 1}}
        with folder.events.open("a") as events:
            events.write(json.dumps({"event": "training_started", "time": "x", "setup": setup}) + "\n")
    assert "Shared cores of each run: A 2 and B 8." in text_of(page_of(*folders))


def test_text_of_models_and_names_of_folders_are_harmless(tmp_path: Path):
    name = "<script>alert(1)<\u2044script>\x1b[2J\u202e"
    one, two = run(tmp_path / name, text=HOSTILE), run(tmp_path / "two", text=HOSTILE, data__path=HOSTILE)
    with two.events.open("a") as events:
        events.write(json.dumps({"event": "alarm", "time": HOSTILE, "message": HOSTILE}) + "\n")
        events.write(json.dumps({"event": "started", "versions": {HOSTILE: HOSTILE}}) + "\n")
    write_json(two.failure, {"message": HOSTILE})
    page = page_of(one, two)
    text = html(page)
    elements = PageElements(text)
    assert not elements.of("script") and not elements.of("img") and len(elements.of("main")) == 1
    assert not set(text) & {"\x1b", "\u202e", "\x9b"}
    console = Console(record=True, width=120, file=io.StringIO())
    print_report(comparison_report(page), console)
    assert not set(console.export_text(styles=False)) & {"\x1b", "\u202e", "\x9b"}


def test_the_terminal_shows_all_but_the_charts(both: tuple[RunFolder, RunFolder]):
    report = comparison_report(page_of(*both))
    assert report.title == "Comparison of A one and B two"
    assert all(isinstance(block, Block) for block in report.blocks)
    assert {block.title for block in report.blocks if isinstance(block, Table)} == {
        "Runs", "Settings that differ", "Before and after", "After training, compared with A one", "Cost", "Alarms",
    }  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_what_a_broken_folder_lacks_is_named_and_the_rest_is_shown(
    state: str, both: tuple[RunFolder, RunFolder], tmp_path: Path, undrawn: None
):
    change, expected = STATES[state]
    shutil.copytree(both[1].path, tmp_path / "run")
    change(RunFolder(tmp_path / "run"))
    runs = read_runs([both[0].path, tmp_path / "run"])
    page = comparison(runs)
    for start in expected:
        assert any(problem.startswith(f"B run: {start}") for problem in problems(runs))
    text = text_of(page)
    for problem in problems(runs):
        assert " ".join(problem.split()) in text
    assert "A one: On 4 held-out prompts, the student is now 50 % nearer" in text
    assert comparison_report(page).blocks


def test_runs_in_every_state_are_called_that(tmp_path: Path, undrawn: None):
    folders = [run(tmp_path / name) for name in ("ended", "failed", "stopped", "running")]
    for folder in folders[1:]:
        folder.summary.unlink()
        folder.evaluation("after").unlink()
    write_json(folders[1].failure, {"message": "rollout-0: it broke"})
    with RunFolder(folders[3].path) as held:
        held._take_lock()
        page = page_of(*folders)
    assert [row[1] for row in tables(page)["Runs"]] == ["finished", "failed", "not finished", "running"]
    text = text_of(page)
    assert "B failed failed: rollout-0: it broke" in text
    assert "After: update 40 for B, update 40 for C and update 40 for D." in text


def test_a_run_that_has_only_begun_is_shown_beside_another(
    both: tuple[RunFolder, RunFolder], tmp_path: Path, undrawn: None
):
    empty = RunFolder(tmp_path / "empty")
    empty.path.mkdir()
    (empty.path / "run.json").write_text("{}")
    for folders in ((both[0], empty), (empty, both[0])):
        page = page_of(*folders)
        assert "settings.json is missing or broken" in text_of(page)
        assert len(tables(page)["Runs"]) == 2


def test_random_damage_never_ends_the_comparison(
    both: tuple[RunFolder, RunFolder], tmp_path: Path, undrawn: None
):
    files = [path.relative_to(both[1].path) for path in sorted(both[1].path.rglob("*")) if path.is_file()]
    chance = random.Random(1)
    for number in range(30):
        folder = tmp_path / str(number)
        shutil.copytree(both[1].path, folder)
        for path in (folder / name for name in chance.sample(files, 3)):
            data = bytearray(path.read_bytes())
            for _ in range(chance.randint(0, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        folders: Sequence[Path] = [both[0].path, folder]
        for order in (folders, folders[::-1]):
            page = comparison(read_runs(order))
            assert "</html>" in html(page) and comparison_report(page).blocks


def test_the_command_prints_and_writes_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
):
    one, two = run(tmp_path / "one"), run(tmp_path / "two", 0.2)
    (two.evaluations / "after-answers.json").unlink()
    assert main(["report", str(one.path), "--compare", str(two.path)]) == 0
    shown = capsys.readouterr()
    assert "Comparison of A one and B two" in shown.out and f"{one.path}/comparison.html" in shown.out
    assert shown.err == "distill: B two: evaluations/after-answers.json is not there: this run has not kept answers; answers after training are not shown\n"  # fmt: skip
    assert (one.path / "comparison.html").is_file() and not (one.path / "report.html").exists()
    place = tmp_path / "page.html"
    assert main(["report", str(one.path), "--compare", str(two.path), "--html", str(place)]) == 0
    assert place.is_file()


REQUESTS: dict[str, tuple[Callable[[Path], list[Path]], str]] = {
    "twice": (lambda one: [one, one / ".." / one.name], "must name each run once"),
    "no run": (lambda one: [one, one.parent], r"it has no run\.json"),
    "many": (lambda one: [one] * (MOST_RUNS + 1), f"must name at most {MOST_RUNS - 1} runs"),
}


@pytest.mark.parametrize("request_name", REQUESTS)
def test_requests_that_cannot_be_carried_out(request_name: str, both: tuple[RunFolder, RunFolder]):
    folders, said = REQUESTS[request_name]
    with pytest.raises(ConfigError, match=said):
        read_runs(folders(both[0].path))
