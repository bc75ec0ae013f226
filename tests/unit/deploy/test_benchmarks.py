"""Ratios, verdicts and files of benchmarks, and the process of a side, without engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from deploy.benchmarks import command, facts
from deploy.benchmarks.harness import (
    Benchmark,
    BenchmarkFailed,
    Label,
    Measurement,
    Pair,
    Ratio,
    alternate,
    rates,
)
from deploy.benchmarks.registry import BENCHMARKS
from deploy.benchmarks.result import compare, document, missed, read_baseline, table
from deploy.benchmarks.side import Side
from deploy.cli.main import main
from distill.errors import ConfigError

SPEED = Benchmark(
    description="a test",
    module="none",
    labels={
        "fast": Label(meaning="tokens/s", goal=0.9),
        "short": Label(meaning="seconds", goal=1.3, at_least=False),
        "free": Label(meaning="no goal"),
    },
)


def measured(fast: float, short: float) -> dict[str, Any]:
    pairs: dict[str, list[Pair]] = {
        "fast": [(fast, 1.0)] * 3,
        "short": [(short, 1.0)] * 3,
        "free": [(0.1, 1.0)],
    }
    return document("speed", SPEED, Measurement(pairs=pairs))


def test_a_ratio_is_ours_over_theirs_with_its_median() -> None:
    assert Ratio.of([(1.0, 2.0), (6.0, 2.0), (4.0, 4.0)]) == Ratio(0.5, 1.0, 3.0)


@pytest.mark.parametrize("pairs", [[], [(0.0, 1.0)], [(1.0, float("inf"))], [(1.0, float("nan"))]])
def test_a_pair_without_a_ratio_is_an_error(pairs: list[Pair]) -> None:
    with pytest.raises(BenchmarkFailed):
        Ratio.of(pairs)


def test_the_order_is_reversed_in_every_second_round() -> None:
    calls: list[str] = []

    def side(name: str) -> Callable[[], int]:
        return lambda: calls.append(name) or len(calls)

    rounds = alternate(3, {"ours": side("ours"), "theirs": side("theirs")})
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert rounds == [{"ours": 1, "theirs": 2}, {"ours": 4, "theirs": 3}, {"ours": 5, "theirs": 6}]


def test_rates_are_tokens_per_second() -> None:
    found = {"a": {"num_tokens": 10, "seconds": 2.0}, "b": {"num_tokens": 9, "seconds": 3.0}}
    assert rates([found], "a", "b") == [(5.0, 3.0)]


def test_a_goal_is_a_lower_or_an_upper_bound() -> None:
    assert missed(SPEED, measured(0.9, 1.3)) == []
    assert missed(SPEED, measured(0.89, 1.31)) == ["fast", "short"]
    lines = table(SPEED, measured(0.89, 1.2)).splitlines()
    assert "at least 0.9, missed" in lines[0]
    assert "at most 1.3, met" in lines[1]
    assert "no goal;" in lines[2]


def test_the_file_has_what_its_readers_need(tmp_path: Path) -> None:
    found = measured(1.0, 1.0)
    assert found["goals"] == {"fast": 0.9, "short": 1.3}
    assert found["ratios"]["fast"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    assert found["raw"]["free"] == [[0.1, 1.0]]
    assert {"name", "date", "commit", "machine", "versions"} <= found.keys()
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert str(Path(__file__).parents[3]) not in text
    assert (facts.machine()["cores"]) >= 1


def test_a_benchmark_must_measure_its_labels() -> None:
    with pytest.raises(BenchmarkFailed, match="be fast, short, free"):
        document("speed", SPEED, Measurement(pairs={"fast": [(1.0, 1.0)]}))


def test_a_median_may_be_a_little_worse_than_the_stored_one() -> None:
    assert compare(SPEED, measured(0.91, 1.09), measured(1.0, 1.0), 0.1) == []
    fast, short = compare(SPEED, measured(0.89, 1.11), measured(1.0, 1.0), 0.1)
    for part in ("speed, fast", "0.890", "1.000", "10%"):
        assert part in str(fast)
    assert "speed, short" in str(short)
    assert "at most 1.100" in str(short)


def test_a_label_that_the_stored_result_lacks_is_not_compared() -> None:
    before = measured(1.0, 1.0)
    del before["ratios"]["fast"]
    assert compare(SPEED, measured(0.1, 1.0), before, 0.1) == []


@pytest.mark.parametrize(
    ("content", "part"),
    [(None, "exist"), ("[]", "contain"), ("{", "JSON"), ('{"name": "x", "ratios": {}}', "not of x")],
)
def test_a_wrong_baseline_is_a_wrong_request(tmp_path: Path, content: str | None, part: str) -> None:
    path = tmp_path / "stored.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=part):
        read_baseline(path, "speed")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Make ``rollout`` the benchmark above, with these ratios."""

    def use(fast: float, short: float) -> None:
        pairs: dict[str, list[Pair]] = {"fast": [(fast, 1.0)], "short": [(short, 1.0)], "free": [(1.0, 1.0)]}
        monkeypatch.setattr(command, "find_benchmark", lambda name: SPEED)
        monkeypatch.setattr(command, "run_benchmark", lambda *_: Measurement(pairs=pairs))

    return use


def test_the_exit_code_is_the_verdict(
    speed: Callable[[float, float], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "rollout.json")
    speed(1.0, 1.0)
    assert main(["bench", "rollout", "--json", file]) == 0
    assert json.loads(Path(file).read_text())["name"] == "rollout"
    speed(0.8, 1.0)
    assert main(["bench", "rollout"]) == 1
    speed(0.9, 1.2)
    assert main(["bench", "rollout", "--baseline", file, "--tolerated-fall", "0.2"]) == 0
    capsys.readouterr()
    speed(0.9, 1.2)
    assert main(["bench", "rollout", "--baseline", file]) == 1
    assert "median of rollout, short=1.200 must be at most 1.100" in capsys.readouterr().err


def test_without_a_name_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(BENCHMARKS)


def test_a_wrong_name_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rolout"]) == 2
    assert "did you mean rollout?" in capsys.readouterr().err


def test_every_registered_module_can_measure() -> None:
    root = Path(facts.__file__).parents[2]
    for benchmark in BENCHMARKS.values():
        source = (root / (benchmark.module.replace(".", "/") + ".py")).read_text()
        assert "\ndef measure(num_pairs: int, say: Say) -> Measurement:" in source


class Echo:
    """An engine for the tests, which run it in a process of its own."""

    def __init__(self, word: str) -> None:
        self._word = word

    @classmethod
    async def start(cls, word: str) -> Self:
        print("output of a library")
        if word == "broken":
            raise ValueError("it cannot start")
        return cls(word)

    async def say(self, times: int) -> list[str]:
        return [self._word] * times

    async def close(self) -> None:
        Path(self._word).write_text("closed")


def test_a_side_answers_calls_and_is_closed(tmp_path: Path) -> None:
    word = str(tmp_path / "word")
    with Side("echo", "tests.unit.deploy.test_benchmarks:Echo", {"word": word}) as side:
        assert side.call("say", times=2) == [word, word]
        with pytest.raises(BenchmarkFailed, match="echo must succeed"):
            side.call("say", wrong=1)
        assert side.pss_bytes() > 1 << 20
    assert (tmp_path / "word").read_text() == "closed"


def test_a_side_that_cannot_start_is_an_error() -> None:
    with pytest.raises(BenchmarkFailed, match="it cannot start"):
        Side("echo", "tests.unit.deploy.test_benchmarks:Echo", {"word": "broken"})
