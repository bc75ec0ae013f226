"""What a run will need on one CPU node, reckoned before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from deploy.run.model_facts import ModelFacts
from distill.config import RunConfig
from distill.machine.hardware import resolve_dtype, resolve_micro_batch_tokens
from distill.replay.draws import BatchPlan

_PROCESS_BYTES = 450 << 20
"""Interpreter, torch and libraries of one actor (PSS, measured)."""
_ENGINE_BYTES = 1300 << 20
"""What a process of vLLM's CPU engine holds beside weights and cache (PSS, measured)."""
_RAY_BYTES = 700 << 20
"""A local Ray: raylet, GCS, agents and its object store's pages in use (PSS, measured)."""


@dataclass(frozen=True)
class Estimates:
    """Bytes and counts of one configuration."""

    config: RunConfig
    teacher: ModelFacts
    student: ModelFacts
    """Of the checkpoint given; for a student that is cut, the teacher's."""
    proxy: ModelFacts | None
    scored: ModelFacts
    """The model whose states are the payload."""
    prompts: pa.Table

    def memory(self) -> dict[str, int]:
        """Bytes per role on one CPU node, all at their peak."""
        config = self.config
        rollout_bytes = 2 if resolve_dtype(config.rollout.dtype, "cpu") == "bfloat16" else 4
        scoring_bytes = 2 if resolve_dtype(config.scoring.dtype, "cpu") == "bfloat16" else 4
        student = self.student_parameters()
        vocabulary_rows = config.learner.vocabulary_chunk * self.teacher.vocab_size * 4
        # Weights, gradient and two moments in float32; about twelve full-vocabulary tensors of a
        # chunk; activations of a micro-batch at about forty numbers of width D per layer.
        layers = config.student.init.num_layers or self.student.config.get("num_hidden_layers", 0)
        tokens = resolve_micro_batch_tokens(config.learner.micro_batch_tokens, "cpu")
        if config.learner.keep_activations:
            tokens = max(tokens, self._update_tokens())
        activations = tokens * self.student.hidden_size * 40 * layers * 4
        learner = (
            student * 16
            + 12 * vocabulary_rows
            + activations
            + 4 * self.teacher.vocab_size * self.teacher.hidden_size
        )
        teacher = self.teacher.num_parameters * scoring_bytes + int(config.scoring.kv_cache_gib * 2**30)
        estimate = {
            "teacher": teacher + self._engine_bytes(config.scoring.engine),
            "learner": learner + _PROCESS_BYTES,
            "ray": _RAY_BYTES,
        }
        if config.recipe.teacher_gives == "text":
            # Beside the teacher, which evaluates; its head beside the teacher's in the learner.
            size = self.proxy.num_parameters if self.proxy is not None else student
            cache = int(config.scoring.kv_cache_gib * 2**30)
            estimate["proxy"] = size * scoring_bytes + cache + self._engine_bytes(config.scoring.engine)
            estimate["learner"] += 4 * self.scored.vocab_size * self.scored.hidden_size
        if config.recipe.uses_student_text:
            rollout = student * rollout_bytes + int(config.rollout.kv_cache_gib * 2**30)
            # vLLM's engine core is a process beside the actor.
            estimate["rollout"] = rollout + _PROCESS_BYTES + self._engine_bytes(config.rollout.engine)
        return estimate

    @staticmethod
    def _engine_bytes(engine: str) -> int:
        return _ENGINE_BYTES if engine == "vllm" else _PROCESS_BYTES

    def _update_tokens(self) -> int:
        """Inputs of one update: prompts of the mean length, responses at their limits."""
        config = self.config
        prompt = len(self.prompts["prompt_tokens"].combine_chunks().flatten()) / len(self.prompts)
        samples = config.learner.prompts_per_update * config.rollout.samples_per_prompt
        student_rows = samples if config.recipe.uses_student_text else 0
        teacher_rows = config.learner.teacher_rows_per_update if config.recipe.teacher_text != "none" else 0
        response = student_rows * config.rollout.max_new_tokens + teacher_rows * config.corpus.max_new_tokens
        return int((student_rows + teacher_rows) * prompt) + response

    def student_parameters(self) -> int:
        if self.config.student.model is not None:
            return self.student.num_parameters
        embedding = self.teacher.vocab_size * self.teacher.hidden_size
        if not self.teacher.config.get("tie_word_embeddings", False):
            embedding *= 2
        layers = self.teacher.config.get("num_hidden_layers", 1)
        share = (self.config.student.init.num_layers or layers) / layers
        return embedding + int(share * (self.teacher.num_parameters - embedding))

    def window(self) -> int:
        """Bytes of the rows of all updates in flight, every response at its limit."""
        config = self.config
        plan = BatchPlan.of(config)
        updates = min(config.replay.max_policy_age + 2, config.learner.num_updates)
        response = max(config.rollout.max_new_tokens, config.corpus.max_new_tokens)
        row = response * (2 * self.scored.hidden_size + 16) + 4 * config.data.max_prompt_tokens + 512
        students = plan.prompts_per_update * config.rollout.samples_per_prompt if plan.may_use_student else 0
        texts = plan.teacher_rows_per_update
        # Where an update has one or the other, a coin or a growing share may give either every time.
        each = students + texts if plan.both_texts else max(students, texts)
        return updates * each * row
