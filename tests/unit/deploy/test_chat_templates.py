"""Faults of chat templates and tokenizers that would spoil a run's texts without an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from deploy.run.preflight import Check, Preflight
from tests.tiny import CHAT_TEMPLATE, save_tiny_llama, tiny_tokenizer
from tests.unit.deploy.conftest import Doctor, fault, passes

DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE
NO_HEADER = "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
UNMARKED = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
FORGETFUL = (
    "{% for message in messages %}<s>{{ message['role'] }}\n"
    "{% if loop.last %}{{ message['content'] }}{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Removes the reasoning of all turns but the last, as templates of reasoning models do."""
ABBREVIATED = CHAT_TEMPLATE.replace("for message in messages", "for message in messages[-3:]")


def with_template(folder: Path, template: str) -> Path:
    save_tiny_llama(folder, vocab_size=260)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def named(preflight: Preflight, name: str) -> Check:
    preflight.require()
    return next(check for check in preflight.checks if check.name == name)


def test_turn_that_ends_with_another_token_than_the_stop_ids(doctor: Doctor, tmp_path: Path) -> None:
    folder = with_template(tmp_path / "model", CHAT_TEMPLATE.replace("</s>", "<end>"))
    error = fault(doctor(folder))
    assert (error.name, error.value) == ("stop ids", "1 '</s>'")
    assert "the chat template ends an answer, 258 '<end>'" in error.must
    assert error.remedy == f"set eos_token_id to [1, 258] in {folder}/generation_config.json"
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 258]}))
    preflight = doctor(folder)
    assert passes(preflight) and preflight.teacher.stop_token_ids == (1, 258)


def test_turn_end_without_a_generation_config(doctor: Doctor, tmp_path: Path) -> None:
    folder = with_template(tmp_path / "model", CHAT_TEMPLATE.replace("</s>", "<end>"))
    path = folder / "generation_config.json"
    path.unlink()
    content, _, place = fault(doctor(folder)).remedy.removeprefix("write ").rpartition(" to ")
    assert Path(place) == path
    path.write_text(content)
    assert passes(doctor(folder))


def test_turn_that_ends_with_plain_text(doctor: Doctor, tmp_path: Path) -> None:
    folder = with_template(tmp_path / "model", UNMARKED.replace("'] }}\n", "'] }}\n###\n"))
    check = named(doctor(folder), "turn end")
    assert check.status == "warn" and "contains no stop id (1 '</s>')" in check.message
    assert check.remedy == "end the assistant's turn in the chat template with '</s>'"
    assert named(doctor(with_template(folder, UNMARKED)), "turn end").status == "pass"


@pytest.mark.parametrize("before", ["", "<s> "])
def test_tokenizer_that_appends_an_end_of_text(doctor: Doctor, tmp_path: Path, before: str) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokens = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before}$A </s>", special_tokens=tokens
    )
    tokenizer.save_pretrained(folder)
    for template in ("false", "true"):
        preflight = doctor(folder, f"data.chat_template={template}")
        assert passes(preflight)
        for prompt in preflight.prompts["prompt_tokens"].to_pylist():
            assert prompt[-1] != 1
            assert template == "true" or (prompt[0] == 0) == bool(before)


def test_template_that_ends_a_prompt_with_an_end_of_text(doctor: Doctor, tmp_path: Path) -> None:
    check = named(doctor(with_template(tmp_path / "model", NO_HEADER)), "prompt end")
    assert check.status == "warn" and "1 '</s>'" in check.message and "add_generation_prompt" in check.remedy
    assert named(doctor(), "prompt end").status == "pass"


def test_template_with_a_date(doctor: Doctor, tmp_path: Path) -> None:
    check = named(doctor(with_template(tmp_path / "model", DATED)), "template date")
    assert check.status == "warn" and "differ from day to day" in check.message
    assert named(doctor(), "template date").status == "pass"


def rows(path: Path, *answers: str) -> str:
    """A data set of conversations, given as a setting."""
    turns = [turn for text in answers for turn in (("user", "q"), ("assistant", text))]
    row = json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("".join(row.replace('"q"', f'"q{number}"') + "\n" for number in range(24)))
    return f"data.path={path}"


THOUGHT = "<think>\nwhy\n</think>\n\nso"


@pytest.mark.parametrize(
    ("template", "answers"), [(FORGETFUL, [THOUGHT, THOUGHT]), (ABBREVIATED, ["so", "no"])]
)
def test_references_of_several_turns_need_a_template_that_keeps_them(
    doctor: Doctor, tmp_path: Path, template: str, answers: list[str]
) -> None:
    folder = with_template(tmp_path / "model", template)
    settings = ("data.max_reference_tokens=128",)
    error = fault(doctor(folder, rows(tmp_path / "rows.jsonl", *answers), *settings))
    assert error.name == "data row 1: the tokenizer's chat template"
    assert "be prefix-stable" in error.must
    assert error.remedy.startswith(
        "set data.reference_turns=first; or use another template; or train without"
    )
    several = rows(tmp_path / "rows.jsonl", *answers)
    assert passes(doctor(folder, several, *settings, "data.reference_turns=first"))
    assert passes(doctor(folder, several, *settings, "sft.enabled=false"))
    assert passes(doctor(folder, rows(tmp_path / "rows.jsonl", answers[0]), *settings))
    kept = with_template(tmp_path / "kept", CHAT_TEMPLATE)
    assert passes(doctor(kept, rows(tmp_path / "rows.jsonl", *answers), *settings))


def test_reasoning_matters_only_where_there_is_some(doctor: Doctor, tmp_path: Path) -> None:
    folder = with_template(tmp_path / "model", FORGETFUL)
    assert passes(doctor(folder, rows(tmp_path / "rows.jsonl", "so", "no")))
