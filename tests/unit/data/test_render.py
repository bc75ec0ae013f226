"""Every part of a row reaches the text that the chat template renders, or the row is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.data import Example, Turn, build_prompts, prompt_facts
from distill.errors import ConfigError
from tests.unit.data.builders import example
from tests.unit.data.kinds import CHAT, DATA, KINDS, fast, row_of


def tools_example(**parts: object) -> Example:
    call = {"function": {"name": "clock", "arguments": {}}}
    reference = (Turn(role="assistant", content="", details={"tool_calls": [call]}),)
    return Example(
        row=0, prompt=(Turn(role="user", content="Time?"),), reference=reference, tools=({"name": "clock"},)
    )


SHOWS_CALLS = CHAT.replace(
    "m['content'] +", "m['content'] + (m['tool_calls'][0]['function']['name'] if m['tool_calls'] else '') +"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT, "data row 1: its tools must be shown by the tokenizer's chat template, which ignores tools"),
        ("{{ tools }}" + CHAT, "data row 1: the assistant's turn=\"clock\" must be shown by the tokenizer's"),
        ("{{ tools }}" + SHOWS_CALLS, None),
    ],
)
def test_tools_and_calls_reach_the_text_or_are_refused(template: str, message: str | None) -> None:
    tokenizer = fast(KINDS["byte-level"](), template)
    if message is None:
        row, _ = row_of(tools_example(), tokenizer, DATA)
        assert "clock" in tokenizer.decode(row["prompt_tokens"])
        assert tokenizer.decode(row["reference_tokens"]) == "clock</s>"
        return
    with pytest.raises(ConfigError, match=message):
        row_of(tools_example(), tokenizer, DATA)


GROUPING = (
    "{% for m in messages %}"
    "{% if m['role'] != 'tool' %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% else %}"
    "{% if messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|user|>' }}{% endif %}"
    "{{ '\n<result>' + m['content'] + '</result>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '</s>\n' }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Results of several tools are one turn, as in the templates of Qwen 2.5 and its successors."""


def test_results_of_several_tools_may_be_one_turn_of_the_template() -> None:
    tokenizer = fast(KINDS["byte-level"](), GROUPING)
    turns = [("assistant", "A"), ("tool", "12"), ("tool", "13"), ("assistant", "B")]
    reference = tuple(Turn(role=role, content=content) for role, content in turns)
    row, _ = row_of(Example(row=0, prompt=example("u:Q").prompt, reference=reference), tokenizer, DATA)
    text = "A</s>\n<|user|>\n<result>12</result>\n<result>13</result></s>\n<|assistant|>\nB</s>"
    assert tokenizer.decode(row["reference_tokens"]) == text
    written = [t for t, kept in zip(row["reference_tokens"], row["reference_mask"], strict=True) if kept]
    assert tokenizer.decode(written) == "A</s>B</s>"


def test_a_template_that_drops_the_system_turn_is_refused() -> None:
    template = "{% for m in messages if m['role'] != 'system' %}" + CHAT.partition("%}")[2]
    with pytest.raises(ConfigError, match=r"data row 1: the system's turn=\"Be kind\" must be shown"):
        row_of(example("s:Be kind", "u:Q", "a:A"), fast(KINDS["byte-level"](), template), DATA)


REASONING = CHAT.replace("m['content'] +", "m['content'].split('</think>')[-1] +")


def test_a_template_that_drops_reasoning_is_refused_only_for_references() -> None:
    tokenizer = fast(KINDS["byte-level"](), REASONING)
    with pytest.raises(ConfigError, match="data row 1: the assistant's turn="):
        row_of(example("u:Q", "a:<think>why</think>A"), tokenizer, DATA)
    history = Example(
        row=0,
        prompt=example("u:P", "a:<think>why</think>A", "u:Q").prompt
        + example("u:P", "a:<think>why</think>A", "u:Q").reference,
        reference=(Turn(role="assistant", content="B"),),
    )
    row, _ = row_of(history, tokenizer, DATA)
    assert "why" not in tokenizer.decode(row["prompt_tokens"])


WITH_TOOLS = "{{ tools }}" + CHAT.replace(
    "m['content'] +",
    "m['content'] + (m.reasoning_content or '') + (m['tool_calls'] | tojson if m['tool_calls'] else '') +",
)


def answer_of(**details: object) -> Example:
    reference = (Turn(role="assistant", content="A", details=details),)
    return Example(row=0, prompt=(Turn(role="user", content="Q"),), reference=reference)


def call_of(**arguments: object) -> dict:
    return {"tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("part", "dropping"),
    [
        (answer_of(**call_of(town="Graz")), ("m['tool_calls'] | tojson", "'clock'")),
        (answer_of(**call_of(day=31)), ("m['tool_calls'] | tojson", "'clock day'")),
        (
            answer_of(**call_of(place={"deep": ['Graz "é"']})),
            ("m['tool_calls'] | tojson", "'clock place deep'"),
        ),
        (answer_of(reasoning_content="because"), ("m.reasoning_content", "''")),
    ],
)
def test_every_part_of_an_answer_reaches_the_text(part: Example, dropping: tuple[str, str]) -> None:
    row_of(part, fast(KINDS["byte-level"](), WITH_TOOLS), DATA)
    with pytest.raises(ConfigError, match=r"data row 1: the assistant's turn=.* must be shown by"):
        row_of(part, fast(KINDS["byte-level"](), WITH_TOOLS.replace(*dropping)), DATA)


def test_a_dropped_turn_is_found_even_if_its_words_are_elsewhere() -> None:
    template = "{% for m in messages if m['role'] != 'system' %}" + CHAT.partition("%}")[2]
    with pytest.raises(ConfigError, match=r"data row 1: the system's turn=\"Be kind\" must be shown"):
        row_of(example("s:Be kind", "u:Be kind, please", "a:A"), fast(KINDS["byte-level"](), template), DATA)


def test_a_template_that_drops_earlier_answers_is_refused() -> None:
    template = CHAT.replace("m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else '') +")
    turns = example("u:P", "a:earlier", "u:Q")
    history = Example(row=0, prompt=turns.prompt + turns.reference, reference=answer_of().reference)
    with pytest.raises(ConfigError, match=r"data row 1: the assistant's turn=\"earlier\" must be shown"):
        row_of(history, fast(KINDS["byte-level"](), template), DATA)


def test_a_template_that_writes_a_tool_without_its_name_is_refused() -> None:
    tool = {"type": "function", "function": {"name": "clock"}}
    row = Example(row=0, prompt=(Turn(role="user", content="Time?"),), tools=(tool,))
    row_of(row, fast(KINDS["byte-level"](), "{{ tools }}" + CHAT), DATA)
    template = "{% for tool in tools or [] %}{{ tool.name }},{% endfor %}" + CHAT
    with pytest.raises(ConfigError, match=r"data row 1: its tool=\"clock\" must be shown"):
        row_of(row, fast(KINDS["byte-level"](), template), DATA)


def test_names_that_the_template_does_not_show_are_counted() -> None:
    row = Example(row=0, prompt=(Turn(role="user", content="Q", details={"name": "Zoe"}),))
    for template, count in ((CHAT, 1), (CHAT.replace("m['role'] +", "m['role'] + m.name|string +"), 0)):
        rows, stop = [row, example("u:other", row=1)], [2]
        table = build_prompts(rows, fast(KINDS["byte-level"](), template), DATA, stop)  # type: ignore[list-item]
        assert prompt_facts(table).num_hidden_names == count


def test_several_turns_without_any_template_have_a_remedy_that_works() -> None:
    tokenizer = fast(KINDS["byte-level"](), None)
    with pytest.raises(ConfigError, match="use a teacher whose tokenizer has a chat template"):
        row_of(example("u:Q", "a:A", "u:R", "a:B"), tokenizer, replace(DATA, chat_template=False))


def test_later_answers_can_be_left_out_where_a_template_changes_earlier_turns() -> None:
    tokenizer = fast(
        KINDS["byte-level"](),
        CHAT.replace("m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else '-') +"),
    )
    row = example("u:Q", "a:A", "u:R", "a:B")
    with pytest.raises(
        ConfigError, match=r"data row 1: .* prefix-stable .*; set data\.reference_turns=first; or use"
    ):
        row_of(row, tokenizer, DATA)
    rows = [row, example("u:other words", "a:one", row=1)]
    first = replace(DATA, reference_turns="first")
    table = build_prompts(rows, tokenizer, first, [tokenizer.eos_token_id])  # type: ignore[list-item]
    found = next(row for row in table.to_pylist() if row["data_row"] == 0)
    assert (tokenizer.decode(found["reference_tokens"]), found["reference_text"]) == ("A</s>", "A")
    assert prompt_facts(table).num_dropped_turns == 1


def test_an_unstable_template_matters_only_where_references_are_trained_on() -> None:
    tokenizer = fast(KINDS["byte-level"](), "{{ messages|length }}" + CHAT)
    rows = [example("u:Q", "a:A", "u:R", "a:B"), example("u:other", "a:one", row=1)]
    stop = tokenizer.eos_token_id
    with pytest.raises(ConfigError, match=r"prefix-stable .* set sft\.enabled=false"):
        build_prompts(rows, tokenizer, DATA, [stop])  # type: ignore[list-item]
    table = build_prompts(rows, tokenizer, DATA, [stop], references_required=False)  # type: ignore[list-item]
    assert table["reference_tokens"].null_count == 2
    assert "A" in table["reference_text"].to_pylist()[0] + table["reference_text"].to_pylist()[1]
