"""Configurations: what loads is what was written, and everything else is an error with the name of the setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distill.config import RunConfig
from distill.config.load import load_config
from distill.config.tree import flat_settings, setting_types
from distill.errors import ConfigError
from tests.unit.bad_input.outcome import cases, outcome_of

NAMES = sorted(setting_types())
CUT = ["student.init.from=teacher", "student.init.num_layers=1"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(["1e3", "0x1f", "nan", ".inf", "???", "${seed}", "${missing}", "${", "a\0b", "9" * 5000, "-1", ""]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2), max_leaves=4
)  # fmt: skip
SECTIONS = sorted({name.partition(".")[0] for name in NAMES})


@cases(120)
@given(
    st.dictionaries(st.sampled_from(SECTIONS) | st.text(max_size=5), VALUES, max_size=3),
    st.sampled_from(NAMES),
    VALUES,
)
def test_any_tree(tmp_path: Path, tree: dict[str, Any], name: str, value: Any):
    """The same value on the command line, where it is text, is refused too or gives the same setting."""
    for part in reversed(name.split(".")):
        value = {part: value}
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({**tree, **value}, allow_unicode=True), encoding="utf-8")
    outcome = outcome_of(lambda: load_config(path, CUT))
    assert outcome.error is None or isinstance(outcome.error, ConfigError)
    if outcome.accepted is not None:
        assert not list(outcome.accepted.violations())


@cases(150)
@given(st.sampled_from(NAMES), st.text(st.characters(exclude_categories=[]), max_size=12) | SCALARS.map(str))
def test_any_override(name: str, text: str):
    outcome = outcome_of(lambda: load_config(None, [*CUT, f"{name}={text}"]))
    if outcome.accepted is not None:
        config = flat_settings(outcome.accepted)
        default = flat_settings(load_config(None, CUT))
        changed = {each for each in NAMES if config[each] != default[each]}
        assert changed <= {name}, "an override changes no other setting"
        if setting_types()[name] is str:
            assert config[name] == text


@cases(100)
@given(
    st.binary(max_size=40)
    | st.text(st.sampled_from("{}[]:,&*a-#'\"!|>%@` \n\t?<"), max_size=40).map(str.encode)
)
def test_any_file(tmp_path: Path, content: bytes):
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    outcome = outcome_of(lambda: load_config(path, CUT))
    assert outcome.error is None or isinstance(outcome.error, ConfigError)


@cases(60)
@given(st.text(max_size=12))
def test_any_text_in_place_of_an_override(text: str):
    outcome = outcome_of(lambda: load_config(None, [*CUT, text]))
    assert outcome.error is None or isinstance(outcome.error, ConfigError)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "learner: &a {learner: *a}", "a: &a [*a]", "data: &a {<<: *a}", "x: " + "[" * 5000, "{" * 5000, "- " * 3000, BOMB,
        f"seed: {'9' * 5000}", "student: {init: {layers: [" + "1, " * 2000 + "]}}", "seed: !!python/object/apply:os.system [true]",
        "seed: !!binary 'AAAA'", "seed: !!timestamp 2001-01-01", "seed: !!set {1}", "? [a]\n: b", "\ufeffseed: 3", "seed: 1\n---\nseed: 2",
        "run_dir: !!python/name:os.getcwd", "seed: [", "\t", "%YAML 9.9\n---\nseed: 1",
    ],
)  # fmt: skip
def test_yaml_that_is_known_to_be_hostile(tmp_path: Path, text: str):
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    outcome = outcome_of(lambda: load_config(path, CUT))
    if outcome.accepted is not None:
        assert isinstance(outcome.accepted, RunConfig) and outcome.accepted.seed in (0, 1, 3)
    else:
        assert isinstance(outcome.error, ConfigError)
        assert len(json.dumps(outcome.error.parts())) < 10_000
