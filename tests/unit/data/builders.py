"""Examples, templates and rows of the prompt table for the data tests."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from distill.config import DataConfig
from distill.data import Example, Turn, build_prompts

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
BOS, STOP = 256, 257
DATA = DataConfig(num_heldout=1)


def without_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_template(tokenizer, None)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    other.chat_template = template
    return other


def example(*turns: str, row: int = 0) -> Example:
    """Build an example from turns such as "u:hello" and "a:hi"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    parsed = tuple(Turn(role=roles[turn[0]], content=turn[2:]) for turn in turns)
    first = next((i for i, turn in enumerate(parsed) if turn.role == "assistant"), len(parsed))
    return Example(row=row, prompt=parsed[:first], reference=parsed[first:])


def only_row(example_: Example, tokenizer, data: DataConfig = DATA) -> dict:
    """Return the table row of an example. A second example exists only to be held out."""
    other = example("u:other", "a:one", row=1)
    table = build_prompts([example_, other], tokenizer, data, [STOP])
    return next(row for row in table.to_pylist() if row["data_row"] == 0)


def written(tokenizer, row: dict) -> str:
    """Return the reference tokens that the loss counts, as text."""
    mask = row["reference_mask"] or [True] * len(row["reference_tokens"])
    return tokenizer.decode([t for t, m in zip(row["reference_tokens"], mask, strict=True) if m])


def many(num_rows: int) -> list[Example]:
    return [example(f"u:prompt {row}", f"a:answer {row}", row=row) for row in range(num_rows)]
