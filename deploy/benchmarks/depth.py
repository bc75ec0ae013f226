"""Measures how much a cut damages a model before any training: by block influence against evenly spaced layers.

    python -m deploy.benchmarks.depth runs/demo --layers 24 20 15 10

The teacher, the calibration texts and the held-out references are those of a run. The number is the mean
cross-entropy of the references, in nats per token; references are cut to --tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.exits import DONE, guarded
from deploy.fetch import local_checkpoint
from distill.config.load import load_config
from distill.run.folder import RunFolder


@dataclass(frozen=True)
class Reference:
    """A prompt and its reference, as token ids."""

    prompt: list[int]
    reference: list[int]


def loss_of(model: Any, texts: Sequence[Reference]) -> float:
    """Mean cross-entropy of all reference tokens, in nats."""
    import torch

    total, num_tokens = 0.0, 0
    for text in texts:
        tokens = torch.tensor([[*text.prompt, *text.reference]])
        with torch.no_grad():
            states = model.get_decoder()(tokens, use_cache=False).last_hidden_state[
                0, len(text.prompt) - 1 : -1
            ]
            logits = model.get_output_embeddings()(states).float()
        total += float(
            torch.nn.functional.cross_entropy(logits, tokens[0, len(text.prompt) :], reduction="sum")
        )
        num_tokens += len(text.reference)
    return total / num_tokens


def losses(
    run_dir: str, layer_counts: Sequence[int], num_texts: int, max_tokens: int
) -> dict[str, dict[int, float]]:
    """Choice of layers -> number of layers -> loss; the whole model is under its own number of layers."""
    import torch
    from transformers import AutoModelForCausalLM

    from learner.model.cut import layer_stack
    from learner.model.depth import block_influence, even_layers, most_influential
    from learner.model.student import resolve_device, resolve_precision
    from learner.process.cut import calibration_texts

    folder = RunFolder(run_dir)
    folder.require()
    config = load_config(folder.config)
    teacher = local_checkpoint(config.teacher.model, config.teacher.revision, "teacher.model")
    device = resolve_device("cpu")
    precision = resolve_precision("auto", device)
    influence = block_influence(
        teacher, calibration_texts(folder.data / "train.parquet"), device=device, precision=precision
    )
    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=precision).eval()
    layers = list(layer_stack(model))
    texts = _heldout(folder.data / "heldout.parquet", num_texts, max_tokens)
    choices: dict[str, Callable[[int], list[int]]] = {
        "block influence": lambda count: most_influential(influence, count),
        "evenly spaced": lambda count: even_layers(len(layers), count),
    }
    found: dict[str, dict[int, float]] = {}
    for name, choose in choices.items():
        found[name] = {}
        for count in (len(layers), *layer_counts):
            model.model.layers = torch.nn.ModuleList(layers[layer] for layer in choose(count))
            model.config.num_hidden_layers = count
            found[name][count] = loss_of(model, texts)
    return found


def _heldout(table: Path, num_texts: int, max_tokens: int) -> list[Reference]:
    from distill.data import read_table

    rows = read_table(table).select(["prompt_tokens", "reference_tokens"]).to_pylist()
    with_reference = [row for row in rows if row["reference_tokens"]]
    return [
        Reference(row["prompt_tokens"], row["reference_tokens"][:max_tokens])
        for row in with_reference[:num_texts]
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", help="the folder of a run")
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 20, 15, 10])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args(arguments)
    found = losses(options.run_dir, options.layers, options.texts, options.tokens)
    counts = list(next(iter(found.values())))
    print("| layers | " + " | ".join(map(str, counts)) + " |")
    print("|---" * (len(counts) + 1) + "|")
    for name, by_count in found.items():
        print(f"| {name} | " + " | ".join(f"{by_count[count]:.2f}" for count in counts) + " |")
    return DONE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
