"""The page of a run: one file, complete, harmless, readable, and made from any state of a run folder."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from deploy.report import html as html_module
from deploy.report.charts import description, svg
from deploy.report.curves import MOST_POINTS, limit_timeline, stage_timeline, update_charts
from deploy.report.html import html
from deploy.report.model import Chart, Page, Series, Timeline
from deploy.report.run_files import read_run
from deploy.report.run_page import run_page, write_page
from deploy.report.run_report import run_report
from distill.errors import ConfigError
from distill.run.folder import RunFolder
from tests.unit.deploy.run_folders import EVENTS, HOSTILE, run_folder, write_events

_EMPTY = {"meta", "img", "line", "path", "use", "br", "input", "link", "rect"}


class PageElements(HTMLParser):
    """The elements of a page, with their text, and the names that the page has more than once."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for each, attributes in self.found if each == tag]


def page_of(folder: RunFolder) -> str:
    return html(run_page(read_run(folder.path)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_folder(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def page(finished: RunFolder) -> str:
    return page_of(finished)


def test_what_the_page_of_a_finished_run_shows(page: str):
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == [
        "Before and after", "Answers", "Learning curves", "Stages", "Cost", "Alarms and events", "Configuration",
        "Versions",
    ]  # fmt: skip
    text = " ".join(PageElements(page).text.split())
    for part in (
        "the student is now 50 % nearer to its teacher",
        "-0.2504 ± 0.00",
        "↓ better",
        "student before",
        "Critics&#39; moment gap d_MM".replace("&#39;", "'"),
        "No stage is busy all the time (the learner most, 56 %): they wait for weights; replay.max_policy_age=5 would",
        "Evaluations and checkpoints held new rollouts back for at most 2.0 % of the training.",
        "60 updates of recipe ammd in 8.0 minutes.",
        "234,567",
        "3.00",
        "update 30: critic/teacher_text.tightness is 0.40",
        "name: ammd",
        "2.13.0",
    ):
        assert part in text, part


def test_the_page_is_one_file_that_loads_nothing(page: str):
    elements = PageElements(page)
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form", "foreignobject"}
    for _, attributes in elements.found:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes)
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert "url(http" not in page and "@import" not in page
    policy = [each["content"] for each in elements.of("meta") if each.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_can_be_read_without_seeing_it(page: str):
    elements = PageElements(page)
    assert elements.of("html") == [{"lang": "en"}]
    assert any("width=device-width" in each.get("content", "") for each in elements.of("meta"))
    assert len(elements.of("main")) == len(elements.of("h1")) == 1
    assert all(each["scope"] in ("col", "row") for each in elements.of("th"))
    assert len(elements.of("caption")) == len(elements.of("table"))
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    regions = [each for each in elements.of("div") if each.get("role") == "group"]
    assert regions
    assert all(each["tabindex"] == "0" and each["aria-labelledby"] in ids for each in regions)
    refers = [
        attributes["aria-labelledby"] for _, attributes in elements.found if "aria-labelledby" in attributes
    ]
    assert {name for names in refers for name in names.split()} <= set(ids)
    used = re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", page)
    assert {first or second for first, second in used} <= set(ids)


def test_every_chart_has_a_unit_a_title_and_a_description(finished: RunFolder, page: str):
    charts = [
        block
        for section in run_page(read_run(finished.path)).sections
        for block in section.blocks
        if isinstance(block, Chart | Timeline)
    ]
    assert len(charts) >= 15
    for chart in charts:
        assert chart.title and chart.unit and len(description(chart)) > 20
    drawings = re.findall(r'<svg viewBox="[^"]+" role="img".*?</svg>', page, re.DOTALL)
    assert len(drawings) == len(charts)
    for drawn in drawings:
        assert re.search(r"<title id=[^>]+>[^<]+, [^<]+</title>\n<desc id=[^>]+>[^<]{20,}</desc>", drawn)
        assert "#fe0" not in drawn and "<style" not in drawn and "xmlns" not in drawn
        assert not re.search(r"(?:fill|stroke): #", drawn)  # every colour is the style sheet's


def test_text_of_models_is_harmless(tmp_path: Path):
    folder = run_folder(tmp_path / "run", text=HOSTILE)
    folder.config.write_text(f"name: {HOSTILE}\n")
    with folder.events.open("a") as events:
        events.write(json.dumps({"event": "alarm", "time": HOSTILE, "message": HOSTILE}) + "\n")
        versions = {HOSTILE: HOSTILE}
        events.write(json.dumps({"event": "started", "time": "x", "versions": versions}) + "\n")
    text = page_of(folder)
    elements = PageElements(text)  # every element is closed by its own end
    assert not elements.of("script") and not elements.of("img")
    assert len(elements.of("main")) == 1
    assert (
        elements.text.count("<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</div></main>") > 6
    )
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_the_same_folder_gives_the_same_file(finished: RunFolder, page: str):
    assert page_of(finished) == page


def test_a_long_run_gives_a_small_file(tmp_path: Path):
    folder = run_folder(tmp_path / "run", num_updates=5000, text="long " * 20_000)
    charts = update_charts(read_run(folder.path))
    assert max(len(series.x) for chart in charts for series in chart.series) <= MOST_POINTS
    (gap,) = [chart for chart in charts if "d_MM" in chart.title]
    assert "Each point is the mean of 13 updates." in gap.note
    assert len(page_of(folder)) < 600_000


def test_the_limiting_stage_is_that_of_the_largest_share(finished: RunFolder):
    timeline = limit_timeline(read_run(finished.path))
    assert timeline is not None
    spans = {lane.label: lane.spans for lane in timeline.lanes}
    assert spans["teacher"] == ()
    both = sorted([*spans["rollout"], *spans["learner"]])
    assert both[0][0] == 0 and both[-1][1] == 60
    assert all(left[1] == right[0] for left, right in pairwise(both))


def test_the_stages_of_all_starts_are_on_one_clock(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    first = [dict(event) for event in EVENTS[:-1]]
    again = [
        {"at": 20, "event": "started", "incarnation": 2},
        {"at": 21, "event": "training_started", "updates_done": 30},
        {"at": 24, "event": "finished", "updates": 60},
    ]
    write_events(folder, [*first, *again])
    timeline = stage_timeline(read_run(folder.path))
    assert timeline is not None
    spans = {lane.label: lane.spans for lane in timeline.lanes}
    # The first start was cut off after six minutes, and the second one lasted four.
    assert spans["distillation"] == (pytest.approx((1.5, 6.0)), pytest.approx((7.0, 10.0)))
    assert spans["resumed"] == (pytest.approx((6.0, 6.0)),)


@pytest.mark.parametrize(
    "values", [(1.0, 1.0 + 1e-9), (0.0, 0.0), (-2.0, -2.0), (1e300, -1e300), (5e-320, 0.0)]
)
def test_nearly_constant_and_extreme_values_are_drawn(values: tuple[float, float]):
    drawn = svg(Chart("A", "b", (Series("c", (0.0, 1.0), values),), from_zero=True), "chart")
    assert "e-9" not in drawn and "nan" not in drawn.lower()


def test_alarms_are_shown_however_many_events_follow(tmp_path: Path):
    folder = run_folder(tmp_path / "run", num_updates=3)
    with folder.events.open("a") as events:
        for update in range(1000):
            events.write(json.dumps({"event": "best", "time": "2026", "update": update}) + "\n")
    text = PageElements(page_of(folder)).text
    assert "tightness is 0.40" in text and "update 999" in text and "update 900" not in text
    assert "The earliest of 1003 events are left out." in text


def _remove(*names: str) -> Callable[[RunFolder], object]:
    return lambda folder: [(folder.path / name).unlink() for name in names]


def _tear(name: str) -> Callable[[RunFolder], object]:
    def tear(folder: RunFolder) -> None:
        path = folder.path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return tear


def _write(name: str, text: str) -> Callable[[RunFolder], object]:
    return lambda folder: (folder.path / name).write_text(text)


STATES = {
    "unfinished": (_remove("summary.json", "evaluations/after.parquet"), ["summary.json is not there: the run has not ended"]),
    "no metrics": (_remove("metrics.parquet"), ["metrics.parquet is not there"]),
    "torn metrics": (_tear("metrics.parquet"), ["metrics.parquet cannot be read"]),
    "torn evaluation": (_tear("evaluations/before.parquet"), ["evaluations/before.parquet cannot be read"]),
    "torn step": (_tear("evaluations/step-20.parquet"), ["evaluations/step-20.parquet cannot be read"]),
    "torn events": (_tear("events.jsonl"), ["events.jsonl has one line that"]),
    "torn summary": (_tear("summary.json"), ["summary.json cannot be read"]),
    "torn answers": (_tear("evaluations/after-answers.json"), ["evaluations/after-answers.json cannot be read"]),
    "torn identity": (_tear("run.json"), ["run.json cannot be read"]),
    "foreign summary": (
        _write("summary.json", json.dumps({name: [None, "x"] for name in (
            "updates", "recipe", "before", "after", "timing_s", "peak_pss_bytes", "wall_s", "tokens", "limit",
        )})),
        [],
    ),
    "foreign files": (
        lambda folder: [
            (folder.path / name).write_text(text)
            for name, text in (
                ("settings.json", '{"learner.num_updates": "many", "replay.max_policy_age": [1]}'),
                ("best/best.json", '{"update": {}, "value": "x"}'),
                ("failure.json", '{"message": ["x"]}'),
                ("events.jsonl", '[]\n{"event": 3}\n{"event": "alarm"}\n{"event": "started", "versions": 3}\n'),
                ("evaluations/after-answers.json", '[{"prompt": 3}, 4]'),
                ("run.json", "[]"),
            )
        ],
        ["run.json cannot be read", "evaluations/after-answers.json cannot be read", "events.jsonl has 2 lines"],
    ),
}  # fmt: skip
DRAWN = ("torn step", "foreign files")


@pytest.mark.parametrize("state", STATES)
def test_what_a_broken_folder_lacks_is_named_and_the_rest_is_shown(
    state: str, finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if state not in DRAWN:  # drawing takes most of the time
        monkeypatch.setitem(html_module._ENVIRONMENT.filters, "svg", lambda drawn, name: drawn.title)
    change, expected = STATES[state]
    shutil.copytree(finished.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    change(folder)
    run = read_run(folder.path)
    assert len(run.problems) >= len(expected)
    for start in expected:
        assert any(problem.startswith(start) for problem in run.problems), run.problems
    assert all("\n" not in problem for problem in run.problems)
    text = PageElements(html(run_page(run))).text
    for problem in run.problems:
        assert " ".join(problem.split()) in " ".join(text.split())
    assert "Learning curves" in text and "Configuration" in text


def test_random_damage_never_ends_the_report(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(html_module._ENVIRONMENT.filters, "svg", lambda drawn, name: description(drawn))
    files = [path.relative_to(finished.path) for path in sorted(finished.path.rglob("*")) if path.is_file()]
    chance = random.Random(0)
    num_problems = 0
    for number in range(40):
        folder = RunFolder(tmp_path / str(number))
        shutil.copytree(finished.path, folder.path)
        for path in (folder.path / name for name in chance.sample(files, 3)):
            data = bytearray(path.read_bytes())
            for _ in range(chance.randint(0, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        run = read_run(folder.path)
        assert "</html>" in html(run_page(run))
        assert run_report(run).blocks
        num_problems += len(run.problems)
    assert num_problems > 40


def test_an_empty_run_and_no_run(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with pytest.raises(ConfigError, match=r"it has no run\.json"):
        read_run(folder.path)
    (folder.path / "run.json").write_text("")
    run = read_run(folder.path)
    names = {problem.partition(" ")[0] for problem in run.problems}
    assert {"run.json", "summary.json", "metrics.parquet", "events.jsonl", "config.yaml"} <= names
    assert "has not ended after 0 updates" in html(run_page(run))


def test_a_run_that_is_still_written_is_called_that(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    folder.summary.unlink()
    with RunFolder(folder.path) as held:
        held._take_lock()
        assert any("the run is still being written" in problem for problem in read_run(folder.path).problems)


def test_a_page_that_cannot_be_written(finished: RunFolder, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--html=\S+ must be a file that can be written"):
        write_page(read_run(finished.path), tmp_path / "file" / "page.html")
    with pytest.raises(ConfigError, match=r"must end with \.html"):
        write_page(read_run(finished.path), finished.config)


def colours(style: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", style))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_in_light_dark_and_print():
    page = html(Page("Run", (), ()))
    forms = [colours(block) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)]
    assert len(forms) == 3
    for form in forms:
        for ground in ("page", "card"):
            for name in ("text", "faint", "good", "bad"):
                assert contrast(form[name], form[ground]) >= 4.5, name
        for name in ("series-1", "series-2", "series-3", "axis", "focus"):
            assert contrast(form[name], form["page"]) >= 3, name
