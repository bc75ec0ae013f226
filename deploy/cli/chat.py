"""`distill chat`: a conversation with a checkpoint, through plain transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.fetch import MODELS, local_checkpoint
from deploy.paths import path_or_name
from deploy.safe_text import strip_control


def run_chat(model: str, prompt: str | None, max_new_tokens: int) -> int:
    """Answer ``prompt``, or lines from the keyboard until an empty one; returns the exit code.

    Raises: ConfigError when the model does not exist.
    """
    folder = local_checkpoint(path_or_name(model, MODELS, "model"), None, "model")
    answer = _load(folder, max_new_tokens)
    if prompt is not None:
        print(strip_control(answer([{"role": "user", "content": prompt}])))
        return 0
    print(f"{strip_control(str(folder))}: an empty line or Ctrl-D ends the conversation", file=sys.stderr)
    turns: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return 0
        if not line:
            return 0
        turns.append({"role": "user", "content": line})
        text = answer(turns)
        turns.append({"role": "assistant", "content": text})
        print(strip_control(text))


def _load(folder: Path, max_new_tokens: int) -> Callable[[list[dict[str, str]]], str]:
    """Load a model; returns a function from the turns of a conversation to the next answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from distill.machine.vector_math import settle_vector_math

    settle_vector_math()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()

    def answer(turns: list[dict[str, str]]) -> str:
        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(turns[-1]["content"], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer
