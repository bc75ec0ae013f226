"""A configuration survives being written and read, and its fingerprint identifies it."""

from __future__ import annotations

import dataclasses
import types
import typing

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import RunConfig
from distill.config.load import load_config
from distill.config.tree import fingerprint, to_yaml
from tests.unit.config.settings import STUDENT, VALID, leaf_paths, replaced


def values(hint: object) -> st.SearchStrategy:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return st.one_of([values(kind) for kind in typing.get_args(hint)])
    if typing.get_origin(hint) is list:
        return st.lists(values(typing.get_args(hint)[0]).filter(lambda value: value != "???"), max_size=3)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    return {
        int: st.one_of(st.integers(0, 100), st.integers(-(10**12), 10**12)),
        float: st.one_of(st.floats(0, 1), st.floats(allow_nan=False, allow_infinity=False)),
        bool: st.booleans(),
        types.NoneType: st.none(),
        # Text that YAML or OmegaConf could misread, and any text that can be encoded.
        str: st.one_of(
            st.sampled_from(["1e3", "null", "~", "yes", "0x1f", "- a", "a: b", "", " x ", "\\", "1_000"]),
            st.text(st.sampled_from("\\${}:#'\" \n\tab"), max_size=12),
            st.text(st.characters(codec="utf-8", exclude_characters="\0")),
        ),
    }[hint]


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Any settings that break no rule; a setting whose drawn value breaks one keeps its default."""
    config = VALID
    for path, hint in draw(st.lists(st.sampled_from(leaf_paths(RunConfig)), max_size=12, unique=True)):
        changed = replaced(config, path, draw(values(hint).filter(lambda value: value != "???")))
        if not list(changed.violations()):
            config = changed
    return config


@settings(max_examples=40, deadline=None)
@given(config=configs())
def test_yaml_round_trip(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    loaded = load_config(path)
    assert loaded == config
    assert fingerprint(loaded) == fingerprint(config)
    assert to_yaml(loaded) == to_yaml(config)


def test_round_trip_of_text_that_looks_like_an_interpolation(load):
    for text in ("${seed}", "\\${seed}", "\\\\${seed}", "a${b", "$${x}", "\\\\"):
        config = dataclasses.replace(load(STUDENT), run_dir=text)
        assert load(to_yaml(config)).run_dir == text


def test_fingerprint_covers_every_setting_that_determines_the_numbers(load):
    config = load(STUDENT)
    same = load(
        STUDENT, ["run_dir=elsewhere", "cluster.address=auto", "cluster.start_timeout_s=5", "tracking.to=[]"]
    )
    assert fingerprint(same) == fingerprint(config)
    assert len(fingerprint(config)) == 16
    for path, hint in leaf_paths(RunConfig):
        if path[0] in ("run_dir", "cluster", "tracking"):
            continue
        old = config
        for name in path:
            old = getattr(old, name)
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        other = next((choice for choice in choices if choice != old), "other")
        new = other if isinstance(old, str) else 77 if old is None else not old if old is True else old + 1
        assert fingerprint(replaced(config, path, new)) != fingerprint(config), path


def test_fingerprint_is_the_same_for_1_and_1_0(load):
    config = load(STUDENT)
    assert fingerprint(replaced(config, ("recipe", "loss_weight"), 1)) == fingerprint(config)
