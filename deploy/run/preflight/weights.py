"""Checks of the tensors in a checkpoint's files against its config.json, without loading them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

from deploy.run.model_facts import ModelFacts
from deploy.run.preflight.outcome import Check
from deploy.run.tensor_files import INDEX, WHOLE, StoredTensor
from distill.errors import ConfigError, first_line

_FLOATS = ("F64", "F32", "F16", "BF16")
_RESAVE = (
    "load it with AutoModelForCausalLM.from_pretrained, write it with save_pretrained(FOLDER), save the tokenizer "
    "there too, and give that folder"
)
_ROWS = 4096
"""Rows of a head that are compared at a time."""


def tensors(role: str, facts: ModelFacts, *, for_vllm: bool) -> Check:
    """Check that the files contain exactly the tensors of the model that config.json describes.

    ``for_vllm``: vLLM is to load the model too.

    Raises: ConfigError.
    """
    setting = f"{role}.model"
    model, loading = _load_without_values(setting, facts)
    _require_no_missing(setting, facts, model, sorted(loading["missing_keys"]))
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ConfigError(
            setting, facts.folder, f"have tensors of the shapes in its config.json ({name} is {list(stored)} "
            f"instead of {list(expected)}{_more(mismatched)})",
            "restore the config.json that the model was saved with",
        )  # fmt: skip
    if unexpected := sorted(loading["unexpected_keys"]):
        raise ConfigError(
            setting, facts.folder, f"contain only tensors of its config.json, not {unexpected[0]}{_more(unexpected)}",
            f"restore the config.json that the model was saved with, or, to leave them out, {_RESAVE}",
        )  # fmt: skip
    _require_tied_equal(setting, facts, model)
    if for_vllm:
        _require_architecture(setting, facts, type(model).__name__)
    return Check(f"{role} weights", "pass", f"{len(facts.tensors)} tensors, those of its config.json")


def require_only_its_files(setting: str, facts: ModelFacts) -> None:
    """Raises: ConfigError when vLLM would load files that do not belong to the model.

    Without an index, vLLM loads every safetensors file of a folder, and the last one counts.
    """
    other = [path.name for path in sorted(facts.folder.glob("*.safetensors")) if path.name != WHOLE]
    if other and not (facts.folder / INDEX).exists():
        raise ConfigError(
            setting, facts.folder, f"contain no safetensors file beside {WHOLE}, because vLLM would load {other[0]}"
            f"{_more(other)} too",
            f"copy the folder without {', '.join(other)}, and give the copy",
        )  # fmt: skip


def head(role: str, facts: ModelFacts) -> Check:
    """Check that the learner finds the head that it multiplies the model's states with.

    Raises: ConfigError.
    """
    from learner.model.head import Head

    setting = f"{role}.model"
    try:
        found = Head.from_checkpoint(facts.folder, device="meta")
    except ConfigError as error:
        raise error.within(setting) from error
    shape = (facts.vocab_size, facts.hidden_size)
    if found.weight.shape != shape:
        raise ConfigError(
            f"{setting}: the head", list(found.weight.shape), f"have the shape {list(shape)} of its config.json",
            "restore the config.json that the model was saved with",
        )  # fmt: skip
    packed = [
        name
        for name, tensor in facts.tensors.items()
        if tensor.shape == shape and tensor.dtype not in _FLOATS
    ]
    if packed:
        raise ConfigError(
            f"{setting}: {packed[0]}", facts.tensors[packed[0]].dtype, "contain plain numbers, because the learner reads the head itself",
            "use a checkpoint whose head is not quantised",
        )  # fmt: skip
    return Check(f"{role} head", "pass", f"{shape[0]} rows of {shape[1]}")


def _load_without_values(setting: str, facts: ModelFacts) -> tuple[Any, dict[str, Any]]:
    """Let transformers load the tensors by name and shape; returns the model and what did not fit.

    Its own loader knows the names that older versions wrote, the tensors that it fuses, and those that it ignores.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        with _quiet():
            config = AutoConfig.from_pretrained(facts.folder, local_files_only=True)
            stored = {
                name: torch.empty(tensor.shape, device="meta") for name, tensor in facts.tensors.items()
            }
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            return model_class.from_pretrained(
                None, config=config, state_dict=stored, device_map={"": "meta"},
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # a config.json can be wrong in as many ways as there are models
        raise ConfigError(
            setting, facts.folder, f"be a causal language model that transformers can load ({first_line(error)})",
            "restore the config.json that the model was saved with, or fetch it again",
        ) from error  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing what the checks report in one line."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _require_no_missing(setting: str, facts: ModelFacts, model: Any, missing: list[str]) -> None:
    if not missing:
        return
    again = "restore the config.json that the model was saved with, or fetch or save the model again"
    output = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is output]
    if missing == [f"{name}.weight" for name in heads]:
        again = f"set tie_word_embeddings to true in its config.json if its head is the embedding; otherwise, {again}"
    raise ConfigError(
        setting, facts.folder, f"contain all tensors of its config.json ({missing[0]}{_more(missing)} missing)", again
    )  # fmt: skip


def _require_tied_equal(setting: str, facts: ModelFacts, model: Any) -> None:
    """transformers would not tie tensors that differ; vLLM and the learner would take the embedding."""
    for name, source in model.all_tied_weights_keys.items():
        own, shared = _stored(facts, model, name), _stored(facts, model, source)
        if own and shared and not _equal(facts, own, shared):
            raise ConfigError(
                setting, facts.folder, f"have {own} equal to {shared}, because its config.json has tie_word_embeddings=true",
                f"set tie_word_embeddings to false in its config.json if {own} is the model's head",
            )  # fmt: skip


def _stored(facts: ModelFacts, model: Any, name: str) -> str | None:
    """The name of a parameter in the files, which may lack the prefix of the model's body."""
    names = (name, name.removeprefix(f"{model.base_model_prefix}."))
    return next((stored for stored in names if stored in facts.tensors), None)


def _equal(facts: ModelFacts, name: str, other: str) -> bool:
    import torch
    from safetensors import safe_open

    def open_one(tensor: StoredTensor) -> Any:
        return safe_open(tensor.file, framework="pt")

    one, two = facts.tensors[name], facts.tensors[other]
    if one.shape != two.shape:
        return False
    with open_one(one) as file, open_one(two) as other_file:
        rows, other_rows = file.get_slice(name), other_file.get_slice(other)
        return all(
            torch.equal(rows[start : start + _ROWS], other_rows[start : start + _ROWS])
            for start in range(0, one.shape[0], _ROWS)
        )


def _require_architecture(setting: str, facts: ModelFacts, name: str) -> None:
    """vLLM chooses its model by ``architectures``, transformers by ``model_type``."""
    listed = facts.config.get("architectures") or []
    if name not in listed:
        raise ConfigError(
            setting, facts.folder, f"list {name} under architectures in its config.json, because vLLM loads what is "
            f"listed ({', '.join(listed) or 'nothing'})",
            _RESAVE,
        )  # fmt: skip


def _more(names: Collection[object]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
