"""The order of the checks, and what they load for the run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa

from deploy.fetch import cache_dir
from deploy.run.estimates import Estimates
from deploy.run.model_facts import ModelFacts
from deploy.run.preflight import data, machine, models, quantised, template, weights
from deploy.run.preflight.outcome import Check, failed
from distill.config import RunConfig
from distill.data import load_rows
from distill.errors import ConfigError
from distill.run.folder import RunFolder

OF_THE_MACHINE = ("engines", "trackers", "cluster", "buffer", "memory", "disk")
"""The checks that say something of this machine alone."""


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

    def run(self, leave_out: Collection[str] = ()) -> list[Check]:
        """Make the checks, up to the first that fails. ``leave_out``: names of checks that are not made."""
        checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
            ("configuration", self._configuration),
            ("engines", lambda: machine.engines(self.config)),
            ("trackers", lambda: machine.trackers(self.config)),
            ("cluster", lambda: machine.cluster(self.config)),
            ("cache", machine.cache),
            ("teacher", self._teacher),
            ("student", self._student),
            ("proxy", self._proxy),
            ("tokenizers", self._tokenizers),
            ("vocabulary", self._vocabulary),
            ("critics", self._critics),
            ("template", self._template),
            ("data", self._data),
            ("buffer", lambda: machine.buffer(self.config, self.estimates)),
            ("memory", lambda: machine.memory(self.estimates)),
            ("disk", lambda: machine.disk(self.config, self.estimates)),
        ]
        for name, check in checks:
            if name in leave_out:
                continue
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

    def _teacher(self) -> Iterator[Check]:
        teacher = self.config.teacher
        self.teacher = models.read(teacher.model, teacher.revision, "teacher.model")
        yield models.size("teacher", self.teacher, self.config)
        models.require_stop_tokens(self.teacher)
        yield models.logits("teacher", self.teacher)
        yield from self._opened("teacher", self.teacher, ("rollout", "scoring"))
        yield weights.head("teacher", self.teacher)

    def _student(self) -> Iterator[Check]:
        student = self.config.student
        if student.model is None:
            quantised.require_plain("student.init.from", self.teacher)
            yield models.cut(self.teacher, student.init)
            self.student = self.teacher
            return
        self.student = models.read(student.model, student.revision, "student.model")
        yield models.size("student", self.student, self.config)
        yield models.logits("student", self.student)
        quantised.require_plain("student.model", self.student)
        yield from self._opened("student", self.student, ("rollout",))

    def _proxy(self) -> Iterator[Check]:
        proxy = self.config.proxy
        if self.config.recipe.teacher_gives == "probabilities":
            return
        if proxy.model is None:
            yield Check("proxy", "pass", "trained from the student's checkpoint on the teacher's text")
            return
        self.proxy = models.read(proxy.model, proxy.revision, "proxy.model")
        yield models.size("proxy", self.proxy, self.config)
        yield models.logits("proxy", self.proxy)
        if proxy.num_updates > 0:
            quantised.require_plain("proxy.model", self.proxy)
        yield from self._opened("proxy", self.proxy, ("scoring",))
        yield weights.head("proxy", self.proxy)

    def _opened(self, role: str, facts: ModelFacts, sections: Sequence[str]) -> Iterator[Check]:
        """Check that the engines of ``sections`` can open a model."""
        for_vllm = any(getattr(self.config, section).engine == "vllm" for section in sections)
        if for_vllm:
            weights.require_only_its_files(f"{role}.model", facts)
        if quantised.quantisation(facts) is not None:
            yield quantised.loaded_by(role, facts, self.config, sections)
        else:
            yield weights.tensors(role, facts, for_vllm=for_vllm)

    def _tokenizers(self) -> Iterator[Check]:
        self.tokenizer = models.load_tokenizer(self.teacher.folder, "teacher.model")
        own = {"student": self.student, "proxy": self.proxy}
        others = {
            role: model for role, model in own.items() if model is not None and model is not self.teacher
        }
        yield models.tokenizers(self.tokenizer, others)

    def _vocabulary(self) -> Iterator[Check]:
        yield models.vocabulary(self.teacher, self.student, self.num_tokens, len(self.tokenizer))

    def _critics(self) -> Iterator[Check]:
        yield models.critics(self.config, self.scored, self.student, self.num_tokens)

    def _template(self) -> Iterator[Check]:
        if not (self.config.data.chat_template and self.tokenizer.chat_template):
            return
        yield template.prompt_end(self.tokenizer, self.teacher.stop_token_ids)
        yield from template.turn_end(self.tokenizer, self.teacher.stop_token_ids, self.teacher.folder)
        yield template.date(self.tokenizer)

    def _data(self) -> Iterator[Check]:
        rows = load_rows(self.config.data, cache_dir())
        yield from data.columns(rows)
        self.prompts = data.prompts(self.config, rows, self.tokenizer, self.teacher.stop_token_ids)
        if (stored := data.stored_prompts(RunFolder(self.config.run_dir), self.prompts)) is not None:
            self.prompts = stored
            yield data.changed()
        self.num_references = data.num_references(self.prompts)
        yield from data.summary(self.config, self.prompts, self.num_references)
