"""Errors as data: one line for the user, parts for programs, and the same error in every process."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from deploy.cluster.failures import ActorFailed, ActorGone
from deploy.exits import guarded
from distill.errors import NO_VALUE, ConfigError, DistillError, Diverged, did_you_mean, first_line
from distill.interfaces import SegmentMissing, WeightPushError
from distill.schema import SchemaError

ROOT = Path(__file__).parents[2]
KIND = re.compile(r"^class (\w+)\((?:DistillError|ConfigError|Diverged)\b", re.MULTILINE)


def all_kinds() -> list[type[DistillError]]:
    """Return every error class of the project. It searches the source and imports only their modules."""
    kinds = [DistillError]
    for package in ("actors", "deploy", "distill", "learner"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for name in KIND.findall(file.read_text()):
                module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                kinds.append(getattr(importlib.import_module(module), name))
    return kinds


# The line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("a.b", 3, "be >= 4", "5 is the default"), "a.b=3 must be >= 4; 5 is the default"),
        (ConfigError("a.b", 3, "be >= 4"), "a.b=3 must be >= 4"),
        (ConfigError("a.b", NO_VALUE, "be a setting", "look"), "a.b must be a setting; look"),
        (ConfigError("a.b", NO_VALUE, "be a setting"), "a.b must be a setting"),
        (ConfigError("a.b", None, "be given"), "a.b=None must be given"),
        (ConfigError("a.b", "", "be given"), "a.b= must be given"),
        (ConfigError(Path("/x/y"), NO_VALUE, "exist"), "/x/y must exist"),
    ],
)
def test_the_line_is_name_value_rule_remedy(error, line):
    assert str(error) == line
    assert error.statement == line.partition("; ")[0]


def test_the_parts_are_attributes():
    error = ConfigError(Path("/x"), 3, "be 4", "take 4")
    assert (error.name, error.value, error.must, error.remedy) == ("/x", 3, "be 4", "take 4")
    assert ConfigError("a", 1, "be 2").remedy == ""


def test_a_rule_is_required():
    with pytest.raises(TypeError):
        ConfigError("the old form: one line")  # pyright: ignore[reportCallIssue]


def test_parts_are_json():
    error = Diverged("loss", float("inf"), "be finite", "lower the rate")
    assert json.loads(json.dumps(error.parts(), allow_nan=False)) == {
        "code": "diverged",
        "name": "loss",
        "value": "inf",
        "must": "be finite",
        "remedy": "lower the rate",
        "message": "loss=inf must be finite; lower the rate",
    }


def test_no_value_is_null_and_none_is_not():
    assert ConfigError("a", NO_VALUE, "exist").parts()["value"] is None
    assert ConfigError("a", None, "exist").parts()["value"] == "None"
    assert ConfigError("a", NO_VALUE, "exist").parts()["message"] == "a must exist"


def test_within_adds_the_context_and_keeps_the_rest():
    error = WeightPushError("push", NO_VALUE, "arrive", "try again")
    inner = error.within("engine").within("rollout-0")
    assert type(inner) is WeightPushError
    assert str(inner) == "rollout-0: engine: push must arrive; try again"
    assert inner.value is NO_VALUE
    assert str(error) == "push must arrive; try again", "the original is unchanged"
    assert str(ConfigError("a", 1, "be 2").within("recipes.kd")) == "recipes.kd: a=1 must be 2"


# Across processes


@pytest.mark.parametrize("module", [pickle, cloudpickle])
@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a", 3, "be 4", "take 4"),
        ConfigError("a", NO_VALUE, "be 4"),
        SchemaError("column a", ["x", None], "be b"),
        SegmentMissing("segment", NO_VALUE, "lie here", "resume"),
        Diverged("loss", float("inf"), "be finite").within("learner"),
    ],
)
def test_pickling_keeps_class_and_parts(module, error):
    for back in (module.loads(module.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(back) is type(error)
        assert back.args == error.args
        assert (back.parts(), str(back)) == (error.parts(), str(error))
        assert (back.value is NO_VALUE) == (error.value is NO_VALUE)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_value_is_a_singleton(protocol):
    assert pickle.loads(pickle.dumps(NO_VALUE, protocol)) is NO_VALUE
    assert copy.deepcopy(NO_VALUE) is NO_VALUE


def test_an_error_of_another_process_is_the_same_error():
    code = (
        "import pickle, sys; from distill.errors import *;"
        "sys.stdout.buffer.write(pickle.dumps(ConfigError('a', NO_VALUE, 'be there', 'put it there')))"
    )
    sent = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    error = pickle.loads(sent)
    assert type(error) is ConfigError and error.value is NO_VALUE
    assert str(error) == "a must be there; put it there"


def test_what_an_actor_raised_keeps_its_class_and_gets_its_name():
    error = ActorFailed.raised("learner", Diverged("loss", float("nan"), "be finite", "lower the rate"))
    assert isinstance(error, Diverged) and error.code == "diverged"
    assert str(error) == "learner: loss=nan must be finite; lower the rate"
    error = ActorFailed.raised("learner", KeyError("x"))
    assert type(error) is ActorFailed and error.code == "actor"
    assert str(error) == "learner must finish its work; it raised KeyError: 'x'"
    late = ActorGone.late(["teacher", "learner"], 600.0)
    assert str(late) == "learner, teacher must answer within 600 s; raise cluster.start_timeout_s"
    late = ActorGone.late(["learner"], 1.0, logs="/logs")
    assert str(late).endswith("; raise cluster.start_timeout_s, or read the actors' logs under /logs")


# Kinds


@pytest.mark.parametrize(
    ("kind", "code", "exit_code", "base"),
    [
        (DistillError, "failed", 1, Exception),
        (ConfigError, "config", 2, ValueError),
        (Diverged, "diverged", 1, FloatingPointError),
        (SchemaError, "schema", 1, ValueError),
        (ActorFailed, "actor", 1, RuntimeError),
        (WeightPushError, "weight_push", 1, RuntimeError),
        (SegmentMissing, "segment_missing", 1, LookupError),
    ],
)
def test_codes_of_the_kinds(kind, code, exit_code, base):
    assert (kind.code, kind.exit_code) == (code, exit_code)
    assert issubclass(kind, DistillError) and issubclass(kind, base)
    assert kind("a", 1, "be 2").parts()["code"] == code


def test_a_code_names_one_kind():
    codes = [kind.code for kind in all_kinds() if kind is not DistillError]
    assert len(set(codes)) == len(codes), sorted(codes)


def test_every_kind_accepts_the_parts_and_survives_pickling():
    kinds = all_kinds()
    assert len(kinds) > 12
    assert [kind.__name__ for kind in kinds if kind.exit_code == 2] == ["ConfigError"]
    for kind in kinds:
        error = pickle.loads(pickle.dumps(kind("a", NO_VALUE, "be b", "c"))).within("d")
        assert type(error) is kind and str(error) == "d: a must be b; c"


@pytest.mark.parametrize("kind", [ConfigError, Diverged, SchemaError])
def test_the_command_line_takes_the_exit_code_from_the_class(kind, capsys):
    def command(_: object) -> int:
        raise kind("a", 1, "be 2", "take 2")

    assert guarded(command, None) == kind.exit_code
    assert capsys.readouterr().err.strip().endswith("a=1 must be 2; take 2")


# Remedies and reasons


def test_did_you_mean():
    names = ["learning_rate", "num_updates"]
    assert did_you_mean("lerning_rate", names) == "did you mean learning_rate?"
    assert (
        did_you_mean("lerning_rate", iter(names), prefix="learner.") == "did you mean learner.learning_rate?"
    )
    assert did_you_mean("zzz", names) == "choose one of them"
    assert did_you_mean("zzz", names, "check the path", prefix="learner.") == "check the path"
    assert did_you_mean("zzz", []) == "choose one of them"
    assert did_you_mean("b", {"bb": 1, "ccc": 2}) == "did you mean bb?"


def test_first_line():
    assert first_line(OSError("no route to host;\nsecond line")) == "no route to host"
    assert first_line(ValueError("it is wrong.")) == "it is wrong"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ConfigError("a", 1, "be 2", "take 2")) == "a=1 must be 2; take 2"


def test_the_first_line_of_an_error_is_never_empty():
    assert first_line(ValueError("\n\nwrong.\nmore")) == "wrong"
    assert first_line(ValueError("  ")) == "ValueError"
