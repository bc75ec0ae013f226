"""A value is read by the type of its setting: text stays as it is written, numbers are read as numbers."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import RunConfig
from distill.config.load import load_config, override
from distill.config.tree import flat_settings, setting_types, to_yaml
from distill.config.written import NULL
from distill.errors import ConfigError
from tests.unit.config.settings import STUDENT

CUT = ["student.init.from=teacher", "student.init.num_layers=1"]
ODD = [
    "2025_11_26",
    "my data #1.jsonl",
    "1e5",
    "on",
    "0x10",
    "2025-11-26",
    "a: b",
    "'q'",
    '"q"',
    " x ",
    "[a]",
    "{",
    "#",
]
ODD += [
    "null",
    "~",
    "${seed}",
    "${",
    "a\\${b",
    "\\",
    "=",
    "a=b",
    "!!int 5",
    "*a",
    "&a",
    "- a",
    "|",
    "?",
    "a\nb",
    "\x85",
]
TEXTS = st.one_of(
    st.sampled_from(ODD),
    st.text(st.sampled_from("\\${}:#'\" \n\tab"), max_size=12),
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),
).filter(lambda text: text != "???")
ALWAYS_TEXT = [name for name, hint in setting_types().items() if hint is str]
MAYBE_NULL = [name for name, hint in setting_types().items() if hint == str | None]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.sampled_from(ALWAYS_TEXT + MAYBE_NULL))
def test_text_on_the_command_line_comes_back_as_it_is(tmp_path_factory, text, name):
    """And from the config.yaml that a run writes of it. The rules are about other things than the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunConfig, "violations", lambda _: iter(()))
        config = load_config(None, [f"{name}={text}"])
        means_null = name in MAYBE_NULL and text in NULL
        assert flat_settings(config)[name] == (None if means_null else text)
        path = tmp_path_factory.getbasetemp() / "written.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(path) == config


def test_texts_of_a_list_on_the_command_line_come_back_as_they_are(load):
    config = load(STUDENT, ['evaluation.shown_prompts=[1e5, "costs ${5}", "\\t"]'])
    assert config.evaluation.shown_prompts == ["1e5", "costs ${5}", "\t"]
    assert load(to_yaml(config)) == config


@pytest.mark.parametrize("text", ["2025_11_26", "1e5", "on", "0x10", "2025-11-26", "12:30:45", "NaN", ".5"])
def test_text_in_a_file_needs_no_quotes(load, text):
    assert load(STUDENT + f"run_dir: {text}\nevaluation: {{shown_prompts: [{text}, b]}}").run_dir == text
    assert load(STUDENT + f"teacher: {{revision: {text}}}").teacher.revision == text
    assert load(STUDENT + f"evaluation: {{shown_prompts: [{text}, b]}}").evaluation.shown_prompts == [
        text,
        "b",
    ]


def test_null_is_null_only_where_it_can_be(load):
    for text in ("null", "~", ""):
        assert load(STUDENT, [f"teacher.revision={text}"]).teacher.revision is None
        assert load(STUDENT + f"teacher: {{revision: {text}}}").teacher.revision is None
    assert load(STUDENT + "teacher: {revision: 'null'}").teacher.revision == "null"
    assert load(STUDENT, ["run_dir=null"]).run_dir == "null"


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("seed", "010", 10),
        ("seed", "0x10", 16),
        ("seed", "1_000", 1000),
        ("seed", " 5 ", 5),
        ("learner.learning_rate", "1e-3", 1e-3),
        ("learner.learning_rate", ".5", 0.5),
        ("learner.learning_rate", "1", 1.0),
        ("sft.enabled", "Off", False),
        ("sft.enabled", "yes", True),
    ],
)
def test_a_number_is_the_same_in_a_file_and_on_the_command_line(load, name, written, value):
    section, _, field = name.rpartition(".")
    text = f"{field}: {written}" if not section else f"{section}: {{{field}: {written}}}"
    for config in (load(STUDENT, [f"{name}={written}"]), load(STUDENT + text)):
        assert flat_settings(config)[name] == value


@pytest.mark.parametrize(
    ("name", "written"),
    [("seed", "1:30"), ("seed", "1e3"), ("seed", "5 # five"), ("learner.learning_rate", "1:30"), ("sft.enabled", "2")],
)  # fmt: skip
def test_what_is_not_a_number_is_refused(load, name, written):
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'{name}={written}')} must be a"):
        load(STUDENT, [f"{name}={written}"])


@pytest.mark.parametrize("written", ["caf\udce9.jsonl", "a\0b"])
def test_text_that_no_file_can_contain_is_refused(load, written):
    with pytest.raises(ConfigError, match=r"^data\.path='.*' must be UTF-8 text without a null byte; rename"):
        load(STUDENT, [f"data.path={written}"])
    with pytest.raises(ConfigError, match=r"must be UTF-8 text"):
        load(STUDENT + f"data: {{path: {json.dumps(written)}}}")


def test_no_path_is_refused(load):
    """`run_dir:` with nothing below it would be the current folder."""
    with pytest.raises(ConfigError, match=r"^run_dir= must name a folder; give a path, such as runs/run$"):
        load(STUDENT + "run_dir:\n")
    with pytest.raises(ConfigError, match=r"^data\.path= must name a data set; give a file"):
        load(STUDENT, ["data.path="])


def test_a_value_whose_type_yaml_chose_is_no_override():
    """A study file is read without the types of settings."""
    for name, value in (("teacher.revision", 1e5), ("data.split", True), ("data.path", None)):
        with pytest.raises(ConfigError, match=rf"^{name}=.* must be text; put it in quotes$"):
            override(name, value)
    with pytest.raises(ConfigError, match=r"^teacher\.revision='null' must not be a text that means null"):
        override("teacher.revision", "null")
    for name, value in (
        ("teacher.revision", None),
        ("seed", 3),
        ("sft.enabled", False),
        ("data.split", "1e5"),
    ):
        assert flat_settings(load_config(None, [*CUT, override(name, value)]))[name] == value


def test_numbers_and_lists_are_read_by_their_type(load):
    config = load(STUDENT, ["learner.learning_rate=1e-3", "sft.enabled=off", "seed=1_0"])
    assert (config.learner.learning_rate, config.sft.enabled, config.seed) == (1e-3, False, 10)
    cut = load(STUDENT, ["student.init={from: teacher, num_layers: null, layers: [0, 2]}"]).student.init
    assert cut.layers == [0, 2] and cut.num_layers is None
    assert load(STUDENT, ["student.init.num_layers=", "student.init.layers=[0,1]"]).student.init.layers == [
        0,
        1,
    ]
