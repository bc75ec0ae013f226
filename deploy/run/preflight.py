"""The checks before any engine starts. `distill train` begins with them; `distill doctor` does only them.

Each check finds one cause of a failure that would otherwise end a run later, when its devices are in use.
The first failure ends the checks. :mod:`deploy.run.prepare` uses what the checks have loaded: prompts and
model facts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pyarrow as pa

from deploy.fetch import cache_dir, local_checkpoint
from deploy.run.estimates import Estimates
from deploy.run.model_facts import ModelFacts, tokenizer_fingerprint
from distill.config import RunConfig, StudentInitConfig
from distill.config.tree import flat_settings
from distill.data import build_prompts, load_rows, num_skipped_prompts, training_rows
from distill.errors import ConfigError, first_line
from distill.run.folder import RunFolder
from distill.run.inputs import shared_memory_root

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    status: Status
    message: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """The message, with the remedy if there is one."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


def failed(name: str, error: ConfigError) -> Check:
    """The outcome of a check that raised ``error``."""
    return Check(name, "fail", error.statement, error.remedy)


class Preflight:
    """The checks of one configuration, in the order of their cost."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.teacher: ModelFacts
        self.student: ModelFacts
        """Facts of the checkpoint that is given; the teacher's for a student that is cut from it."""
        self.tokenizer: Any
        self.prompts: pa.Table
        self.num_references = 0
        """Training prompts that have a reference."""
        self.proxy: ModelFacts | None = None
        """The model that provides probabilities when the teacher gives only text, if it is not the student."""
        self.checks: list[Check] = []
        self.failure: ConfigError | None = None
        """The error of the failed check."""

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary that the models have in common."""
        models = [self.teacher, self.student, *([self.proxy] if self.proxy is not None else [])]
        return min(model.vocab_size for model in models)

    @property
    def scored(self) -> ModelFacts:
        """The model whose hidden states are the payload: the teacher, or its proxy."""
        if self.config.recipe.teacher_gives == "probabilities":
            return self.teacher
        return self.proxy or self.student

    @property
    def estimates(self) -> Estimates:
        return Estimates(self.config, self.teacher, self.student, self.proxy, self.scored, self.prompts)

    def run(self) -> list[Check]:
        """Make the checks, up to the first that fails."""
        checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
            ("configuration", self._configuration),
            ("engines", self._engines),
            ("teacher", self._teacher),
            ("student", self._student),
            ("proxy", self._proxy),
            ("tokenizers", self._tokenizers),
            ("vocabulary", self._vocabulary),
            ("critics", self._critics),
            ("data", self._data),
            ("buffer", self._buffer),
            ("memory", self._memory),
            ("disk", self._disk),
            ("ports", self._ports),
        ]
        for name, check in checks:
            try:
                self.checks += list(check())
            except ConfigError as error:
                self.failure = error
                self.checks.append(failed(name, error))
                break
        return self.checks

    def require(self) -> None:
        """Raises: ConfigError of the check that failed, if one did."""
        if self.failure is not None:
            raise self.failure

    def _configuration(self) -> Iterator[Check]:
        self.config.validate()
        yield Check("configuration", "pass", "all settings are valid")
        recipe = self.config.recipe
        needs = "token probabilities" if recipe.payload == "hidden" else "only text"
        source = "teacher" if recipe.teacher_gives == "probabilities" else "proxy"
        yield Check(
            "payload", "pass", f"recipe {recipe.name} needs {needs}; the {source} provides hidden states"
        )

    def _engines(self) -> Iterator[Check]:
        for section in ("rollout", "scoring"):
            engine = getattr(self.config, section).engine
            if engine == "vllm" and importlib.util.find_spec("vllm") is None:
                raise ConfigError(
                    f"{section}.engine", "vllm", "be installed",
                         "install the cpu or gpu extra, or set engine=transformers"
                )  # fmt: skip
        if self.config.learner.device == "cuda" and self.config.cluster.address is None:
            from torch.cuda import is_available

            if not is_available():
                raise ConfigError(
                    "learner.device",
                    "cuda",
                    "be available (torch finds no GPU)",
                    "set it to auto, or use a machine with a GPU",
                )
        yield Check(
            "engines",
            "pass",
            f"rollout by {self.config.rollout.engine}, scoring by {self.config.scoring.engine}",
        )

    def _teacher(self) -> Iterator[Check]:
        teacher = self.config.teacher
        folder = local_checkpoint(teacher.model, teacher.revision, "teacher.model")
        self.teacher = ModelFacts.read(folder, "teacher.model")
        yield self._model("teacher", self.teacher)
        if not self.teacher.stop_token_ids:
            raise ConfigError(
                "teacher.model", folder, "name an eos_token_id in its generation_config.json",
                     "add one, because no text ends without it"
            )  # fmt: skip
        yield self._transform("teacher", self.teacher)

    def _student(self) -> Iterator[Check]:
        student = self.config.student
        if student.model is None:
            self.student = self.teacher
            yield self._cut_student(student.init)
            return
        folder = local_checkpoint(student.model, student.revision, "student.model")
        self.student = ModelFacts.read(folder, "student.model")
        yield self._model("student", self.student)
        yield self._transform("student", self.student)

    def _cut_student(self, init: StudentInitConfig) -> Check:
        layers = self.teacher.config.get("num_hidden_layers", 0)
        if init.layers is not None and init.layers[-1] >= layers:
            must = f"be in [0, {layers - 1}], the teacher's layers"
            raise ConfigError("student.init.layers", init.layers, must, "keep other layers")
        if init.num_kept > layers:
            raise ConfigError(
                "student.init.num_layers", init.num_kept, f"be <= the teacher's {layers}", "lower it"
            )
        choice = "as configured"
        if init.layers is None:
            choice = "evenly spaced" if init.select == "even" else "chosen by block influence"
        return Check("student", "pass", f"{init.num_kept} of the teacher's {layers} layers, {choice}")

    def _proxy(self) -> Iterator[Check]:
        proxy = self.config.proxy
        if self.config.recipe.teacher_gives == "probabilities":
            return
        if proxy.model is None:
            yield Check("proxy", "pass", "trained from the student's checkpoint on the teacher's text")
            return
        self.proxy = ModelFacts.read(
            local_checkpoint(proxy.model, proxy.revision, "proxy.model"), "proxy.model"
        )
        yield self._model("proxy", self.proxy)
        yield self._transform("proxy", self.proxy)

    def _model(self, role: str, facts: ModelFacts) -> Check:
        if "auto_map" in facts.config:
            raise ConfigError(
                f"{role}.model", facts.folder, "not need code from its folder (it has auto_map)",
                     "use a built-in architecture"
            )  # fmt: skip
        wanted = self.config.max_model_tokens
        if facts.context_tokens < wanted:
            limits = ("rollout.max_new_tokens", "corpus.max_new_tokens", "data.max_reference_tokens")
            longest = max(limits, key=flat_settings(self.config).__getitem__)
            raise ConfigError(
                f"{role} context", facts.context_tokens, f"be >= the longest sequence, {wanted} tokens",
                     f"lower data.max_prompt_tokens or {longest}"
            )  # fmt: skip
        millions = facts.num_parameters / 1e6
        return Check(
            role, "pass", f"{facts.model_type}, {millions:.0f} M parameters, context {facts.context_tokens}"
        )

    def _transform(self, role: str, facts: ModelFacts) -> Check:
        from learner.model.head import LogitTransform

        LogitTransform.from_config(facts.config)
        return Check(f"{role} logits", "pass", f"the logit transform of {facts.model_type} is known")

    def _tokenizers(self) -> Iterator[Check]:
        self.tokenizer = _load_tokenizer(self.teacher.folder, "teacher.model")
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        for role, model in (("student", self.student), ("proxy", self.proxy)):
            if model is None or model is self.teacher:
                continue
            other = tokenizer_fingerprint(_load_tokenizer(model.folder, f"{role}.model"))
            if other != fingerprint:
                raise ConfigError(
                    f"{role} tokenizer", other, f"be the teacher's ({fingerprint})",
                         f"choose a {role} of the teacher's family, because probabilities are compared token by token"
                )  # fmt: skip
        yield Check("tokenizers", "pass", f"all models have the same one, fingerprint {fingerprint}")

    def _vocabulary(self) -> Iterator[Check]:
        teacher, student, used = self.teacher.vocab_size, self.student.vocab_size, len(self.tokenizer)
        if self.num_tokens < used:
            raise ConfigError(
                "vocabulary", self.num_tokens, f"be >= the tokenizer's {used} ids",
                     "choose models that have a logit for every token"
            )  # fmt: skip
        if teacher != student:
            yield Check(
                "vocabulary",
                "warn",
                f"padded to {teacher} rows in the teacher and {student} in the student: the first "
                f"{self.num_tokens} are compared and sampled, the rest are masked",
            )
        else:
            yield Check("vocabulary", "pass", f"{teacher} rows, of which the tokenizer uses {used}")

    def _critics(self) -> Iterator[Check]:
        critic = self.config.critic
        if not self.config.method.learns_critics:
            yield Check("critics", "pass", "the recipe learns no critic")
            return
        models = [self.scored, *([self.student] if critic.features == "both" else [])]
        size = min(model.hidden_size for model in models)
        if critic.rank is not None and critic.rank > size:
            raise ConfigError(
                "critic.rank", critic.rank, f"be <= the hidden size of the states that it reads, {size}",
                     "lower it, or set it to null for a dense head"
            )  # fmt: skip
        shape = f"rank {critic.rank}" if critic.rank else f"dense, {self.num_tokens} rows of {size}"
        count = "two" if self.config.recipe.uses_student_text else "one"
        yield Check("critics", "pass", f"{count}, {shape}, features {critic.features}")

    def _data(self) -> Iterator[Check]:
        data = self.config.data
        rows = load_rows(data, cache_dir())
        self.prompts = build_prompts(
            rows, self.tokenizer, data, self.teacher.stop_token_ids, self.config.seed
        )
        heldout = data.num_heldout
        train = self.prompts.num_rows - heldout
        references = training_rows(self.prompts)["reference_tokens"]
        self.num_references = len(references) - references.null_count
        recipe = self.config.recipe
        if self.num_references == 0 and (self.config.sft.enabled or recipe.teacher_text == "reference"):
            raise ConfigError(
                "data", data.path, "have references (completions), which the warm start or the recipe uses",
                     "add completions, or set sft.enabled=false and recipe.teacher_text=sampled"
            )  # fmt: skip
        num_skipped = num_skipped_prompts(self.prompts)
        skipped = f", {num_skipped} skipped because they are too long" if num_skipped else ""
        template = "the teacher's chat template" if data.chat_template else "no chat template"
        yield Check("data", "pass", f"{train} training prompts, {heldout} held out{skipped}; {template}")

    def _buffer(self) -> Iterator[Check]:
        config = self.config
        need = self.estimates.window()
        if need > config.replay.max_bytes:
            raise ConfigError(
                "replay.max_bytes", config.replay.max_bytes,
                     f"be >= the size of the rows of {config.replay.max_policy_age + 2} updates, {need} bytes",
                     "raise it or use smaller batches, because the learner waits for all rows of an update"
            )  # fmt: skip
        yield Check(
            "buffer", "pass", f"needs {need >> 20} MiB of at most {config.replay.max_bytes >> 20} MiB"
        )

    def _memory(self) -> Iterator[Check]:
        need = sum(self.estimates.memory().values())
        available = psutil.virtual_memory().available
        parts = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in self.estimates.memory().items())
        message = f"needs about {need / 2**30:.1f} GiB of {available / 2**30:.1f} GiB available ({parts})"
        if need > available:
            yield Check("memory", "warn", message,
                        "lower kv_cache_gib or learner.micro_batch_tokens, or set learner.keep_activations=false")  # fmt: skip
        else:
            yield Check("memory", "pass", message)

    def _disk(self) -> Iterator[Check]:
        config = self.config
        run_dir = Path(config.run_dir).absolute()
        place = next(path for path in (run_dir, *run_dir.parents) if path.exists())
        if not place.is_dir():
            raise ConfigError(
                "run_dir", run_dir, f"be a folder ({place} is a file)", "choose another run_dir"
            )
        RunFolder(run_dir).refuse_foreign_files()
        if not os.access(place, os.W_OK):
            raise ConfigError("run_dir", run_dir, f"be writable ({place} is not)", "choose another run_dir")
        student = self.estimates.student_parameters()
        # A checkpoint contains weights and two moments. A new one is complete before the oldest is deleted.
        need = student * 12 * (config.checkpoint.keep + 1) + student * 4 * 4
        free = shutil.disk_usage(place).free
        if free < need:
            raise ConfigError(
                "free disk", f"{free >> 20} MiB", f"be >= {need >> 20} MiB at {place}",
                     "lower checkpoint.keep or choose another run_dir"
            )  # fmt: skip
        shm = shared_memory_root()
        wanted = min(config.replay.memory_bytes, self.estimates.window()) + 2 * 4 * student
        if (left := shutil.disk_usage(shm).free) < wanted:
            raise ConfigError(
                "free shared memory", f"{left >> 20} MiB", f"be >= {wanted >> 20} MiB at {shm}",
                     "lower replay.memory_bytes, or give the container a larger /dev/shm"
            )  # fmt: skip
        yield Check(
            "disk",
            "pass",
            f"needs {need >> 20} MiB of {free >> 20} MiB free, and {wanted >> 20} MiB of shared memory",
        )

    def _ports(self) -> Iterator[Check]:
        if self.config.cluster.backend == "in_process":
            yield Check("ports", "pass", "not needed, because all actors live in one process")
            return
        if self.config.cluster.address is not None:
            yield Check("ports", "pass", f"those of the Ray cluster at {self.config.cluster.address}")
            return
        try:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
        except OSError as error:
            raise ConfigError(
                "loopback",
                "127.0.0.1",
                f"have a free port ({error})",
                "free one, because a local Ray listens on loopback",
            ) from error
        yield Check("ports", "pass", "loopback has free ports for a local Ray")


def _load_tokenizer(folder: Path, setting: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            setting, folder, f"contain a tokenizer ({first_line(error)})", "save one in the model's folder"
        ) from error
