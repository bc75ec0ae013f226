"""Checks of the models: their sizes and logits, and whether they suit each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.fetch import MODELS, local_checkpoint
from deploy.run.model_facts import SAVE_AGAIN, ModelFacts, tokenizer_fingerprint
from deploy.run.preflight.outcome import Check
from distill.config import RunConfig, StudentInitConfig
from distill.config.tree import flat_settings
from distill.errors import ConfigError, first_line


def read(name: str, revision: str | None, setting: str) -> ModelFacts:
    """Find a checkpoint and read its facts; ``setting`` is its name in errors.

    Raises: ConfigError.
    """
    folder = local_checkpoint(name, revision, setting)
    return ModelFacts.read(folder, setting, _again(name, folder))


def _again(name: str, folder: Path) -> str:
    """How to get a checkpoint whose files are missing or broken."""
    if name in MODELS:
        return f"delete {folder} and run `distill models fetch {name}` again"
    if Path(name).is_dir():
        return SAVE_AGAIN
    repository = folder.parents[1]  # what the hub's client has of it: snapshots/REVISION is the folder
    return f"delete {repository} and run this again with access to the hub"


def size(role: str, facts: ModelFacts, config: RunConfig) -> Check:
    """Check that a model is built in and has room for the longest sequence.

    Raises: ConfigError.
    """
    if "auto_map" in facts.config:
        raise ConfigError(
            f"{role}.model", facts.folder, "not need code from its folder (it has auto_map)",
                 "use a built-in architecture"
        )  # fmt: skip
    wanted = config.max_model_tokens
    if facts.context_tokens < wanted:
        limits = ("rollout.max_new_tokens", "corpus.max_new_tokens", "data.max_reference_tokens")
        longest = max(limits, key=flat_settings(config).__getitem__)
        raise ConfigError(
            f"{role} context", facts.context_tokens, f"be >= the longest sequence, {wanted} tokens",
                 f"lower data.max_prompt_tokens or {longest}"
        )  # fmt: skip
    millions = facts.num_parameters / 1e6
    return Check(
        role, "pass", f"{facts.model_type}, {millions:.0f} M parameters, context {facts.context_tokens}"
    )


def require_stop_tokens(teacher: ModelFacts) -> None:
    """Raises: ConfigError when the teacher has no token that ends a text."""
    if not teacher.stop_token_ids:
        raise ConfigError(
            "teacher.model", teacher.folder, "name an eos_token_id in its generation_config.json",
                 "add one, because no text ends without it"
        )  # fmt: skip


def logits(role: str, facts: ModelFacts) -> Check:
    """Check that the learner knows how logits follow from the model's states.

    Raises: ConfigError.
    """
    from learner.model.head import LogitTransform

    LogitTransform.from_config(facts.config)
    return Check(f"{role} logits", "pass", f"the logit transform of {facts.model_type} is known")


def cut(teacher: ModelFacts, init: StudentInitConfig) -> Check:
    """Check that a student with the wanted layers can be cut from the teacher.

    Raises: ConfigError.
    """
    layers = teacher.config.get("num_hidden_layers", 0)
    if init.layers is not None and init.layers[-1] >= layers:
        must = f"be in [0, {layers - 1}], the teacher's layers"
        raise ConfigError("student.init.layers", init.layers, must, "keep other layers")
    if init.num_kept > layers:
        must = f"be <= the teacher's {layers}"
        raise ConfigError("student.init.num_layers", init.num_kept, must, "lower it")
    choice = "as configured"
    if init.layers is None:
        choice = "evenly spaced" if init.select == "even" else "chosen by block influence"
    return Check("student", "pass", f"{init.num_kept} of the teacher's {layers} layers, {choice}")


def load_tokenizer(folder: Path, setting: str) -> Any:
    """Load a checkpoint's tokenizer; ``setting`` is the checkpoint's name in errors.

    Raises: ConfigError.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            setting, folder, f"contain a tokenizer ({first_line(error)})", "save one in the model's folder"
        ) from error


def tokenizers(tokenizer: Any, others: Mapping[str, ModelFacts]) -> Check:
    """Check that the other models, by role, have the teacher's ``tokenizer``.

    Raises: ConfigError.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    for role, model in others.items():
        other = tokenizer_fingerprint(load_tokenizer(model.folder, f"{role}.model"))
        if other != fingerprint:
            raise ConfigError(
                f"{role} tokenizer", other, f"be the teacher's ({fingerprint})",
                     f"choose a {role} of the teacher's family, because probabilities are compared token by token"
            )  # fmt: skip
    return Check("tokenizers", "pass", f"all models have the same one, fingerprint {fingerprint}")


def vocabulary(teacher: ModelFacts, student: ModelFacts, num_tokens: int, num_used: int) -> Check:
    """Check that the ``num_tokens`` that all models have include the ``num_used`` of the tokenizer.

    Raises: ConfigError.
    """
    if num_tokens < num_used:
        raise ConfigError(
            "vocabulary", num_tokens, f"be >= the tokenizer's {num_used} ids",
                 "choose models that have a logit for every token"
        )  # fmt: skip
    if teacher.vocab_size != student.vocab_size:
        return Check(
            "vocabulary",
            "warn",
            f"padded to {teacher.vocab_size} rows in the teacher and {student.vocab_size} in the student: "
            f"the first {num_tokens} are compared and sampled, the rest are masked",
        )
    return Check("vocabulary", "pass", f"{teacher.vocab_size} rows, of which the tokenizer uses {num_used}")


def critics(config: RunConfig, scored: ModelFacts, student: ModelFacts, num_tokens: int) -> Check:
    """Check the critics' rank; ``scored`` is the model whose states they read.

    Raises: ConfigError.
    """
    critic = config.critic
    if not config.method.learns_critics:
        return Check("critics", "pass", "the recipe learns no critic")
    models = [scored, *([student] if critic.features == "both" else [])]
    width = min(model.hidden_size for model in models)
    if critic.rank is not None and critic.rank > width:
        raise ConfigError(
            "critic.rank", critic.rank, f"be <= the hidden size of the states that it reads, {width}",
                 "lower it, or set it to null for a dense head"
        )  # fmt: skip
    shape = f"rank {critic.rank}" if critic.rank else f"dense, {num_tokens} rows of {width}"
    count = "two" if config.recipe.uses_student_text else "one"
    return Check("critics", "pass", f"{count}, {shape}, features {critic.features}")
