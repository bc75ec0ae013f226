"""Estimates of the memory that a run needs on one CPU node, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from deploy.placement import num_engines
from deploy.run.model_facts import ModelFacts
from distill.config import RolloutConfig, RunConfig, ScoringConfig
from distill.machine.hardware import resolve_dtype, resolve_micro_batch_tokens
from distill.replay.draws import BatchPlan

_PROCESS_BYTES = 450 << 20
"""One actor's interpreter, torch and other libraries (PSS, measured)."""
_ENGINE_BYTES = 1385 << 20
"""A process of vLLM's CPU engine, without weights and cache (PSS, measured), 85 MiB of it for the publisher of its
metrics, which imports ray.serve."""
_RAY_BYTES = 700 << 20
"""A local Ray: raylet, GCS, agents, and the pages of its object store that are in use (PSS, measured)."""


def sampler_name(config: RunConfig) -> str:
    """The name of the actor that samples the student: ``sampler`` when it does so only for evaluations."""
    return "rollout" if config.recipe.uses_student_text else "sampler"


@dataclass(frozen=True)
class Estimates:
    """Bytes and counts of one configuration."""

    config: RunConfig
    teacher: ModelFacts
    student: ModelFacts
    """Facts of the checkpoint that is given; the teacher's for a student that is cut from it."""
    proxy: ModelFacts | None
    scored: ModelFacts
    """The model whose hidden states are the payload."""
    prompts: pa.Table

    def memory(self) -> dict[str, int]:
        """Bytes per role on one CPU node, all actors at their peak."""
        engines = num_engines(self.config)
        numbers = {"teacher": engines["teacher"], sampler_name(self.config): engines["rollout"]}
        numbers["proxy"] = engines.get("proxy", 0)
        return {role: num_bytes * numbers.get(role, 1) for role, num_bytes in self.memory_of_actors().items()}

    def memory_of_actors(self) -> dict[str, int]:
        """Bytes of one actor of each role at its peak, if it computes on a CPU, and of Ray."""
        config = self.config
        estimate = {
            "teacher": self._scorer(self.teacher.num_parameters),
            "learner": self._learner(),
            "ray": _RAY_BYTES,
            sampler_name(config): self._sampler(),
        }
        if config.recipe.teacher_gives == "text":
            # The teacher stays for evaluations, and the learner has both unembeddings.
            estimate["proxy"] = self._scorer(self._proxy_parameters())
            estimate["learner"] += 4 * self.scored.vocab_size * self.scored.hidden_size
        return estimate

    def memory_of_devices(self) -> dict[str, int]:
        """Bytes that one device of each role needs at least, if each actor has GPUs of its own.

        An engine needs its part of the weights in 16 bits, within ``gpu_memory_utilization`` of its device. What is left
        of that is its KV cache. The learner needs what it needs on a CPU, apart from its process.
        """
        config = self.config
        sizes = {
            "teacher": (self.teacher.num_parameters, config.scoring),
            sampler_name(config): (self.student_parameters(), config.rollout),
        }
        if config.recipe.teacher_gives == "text":
            sizes["proxy"] = (self._proxy_parameters(), config.scoring)
        need = {
            role: int(2 * parameters / engine.tensor_parallel_size / engine.gpu_memory_utilization)
            for role, (parameters, engine) in sizes.items()
        }
        on_cpu = self.memory_of_actors()["learner"] - self._learner()
        return {**need, "learner": on_cpu + self._learner("cuda") - _PROCESS_BYTES}

    def _proxy_parameters(self) -> int:
        return self.proxy.num_parameters if self.proxy is not None else self.student_parameters()

    def _learner(self, device: Literal["cpu", "cuda"] = "cpu") -> int:
        config = self.config
        vocabulary_rows = config.learner.vocabulary_chunk * self.teacher.vocab_size * 4
        # Weights, gradient and two moments in float32; about twelve full-vocabulary tensors of a
        # chunk; activations of a micro-batch at about forty numbers of width D per layer. Between two updates,
        # a checkpoint is written from a copy of weights and moments.
        layers = config.student.init.num_kept or self.student.config.get("num_hidden_layers", 0)
        tokens = resolve_micro_batch_tokens(config.learner.micro_batch_tokens, device)
        if config.learner.keep_activations:
            tokens = max(tokens, self._update_tokens())
        activations = tokens * self.student.hidden_size * 40 * layers * 4
        # Evaluations beside the updates measure a copy of the weights.
        copy = 0 if config.replay.lock_step else 4 * self.student_parameters()
        return (
            copy
            + self.student_parameters() * 16
            + max(12 * vocabulary_rows + activations, self.student_parameters() * 12)
            + 4 * self.teacher.vocab_size * self.teacher.hidden_size
            + _PROCESS_BYTES
        )

    def _scorer(self, num_parameters: int) -> int:
        scoring = self.config.scoring
        return self._engine_bytes(scoring.engine) + self._model(num_parameters, scoring)

    def _sampler(self) -> int:
        rollout = self.config.rollout
        # vLLM's engine core is a process in addition to the actor's.
        processes = _PROCESS_BYTES + self._engine_bytes(rollout.engine)
        return processes + self._model(self.student_parameters(), rollout)

    @staticmethod
    def _model(num_parameters: int, engine: RolloutConfig | ScoringConfig) -> int:
        """Weights and KV cache."""
        weight_bytes = 2 if resolve_dtype(engine.dtype, "cpu") == "bfloat16" else 4
        return num_parameters * weight_bytes + int(engine.kv_cache_gib * 2**30)

    @staticmethod
    def _engine_bytes(engine: str) -> int:
        return _ENGINE_BYTES if engine == "vllm" else _PROCESS_BYTES

    def _update_tokens(self) -> int:
        """Input tokens of one update, with prompts of the mean length and responses at their limits."""
        config = self.config
        prompt = len(self.prompts["prompt_tokens"].combine_chunks().flatten()) / len(self.prompts)
        samples = config.learner.prompts_per_update * config.rollout.samples_per_prompt
        student_rows = samples if config.recipe.uses_student_text else 0
        teacher_rows = config.learner.teacher_rows_per_update if config.recipe.teacher_text != "none" else 0
        response = student_rows * config.rollout.max_new_tokens + teacher_rows * self._teacher_text_limit
        return int((student_rows + teacher_rows) * prompt) + response

    @property
    def _teacher_text_limit(self) -> int:
        """Longest response of the recipe's teacher text, in tokens."""
        if self.config.recipe.teacher_text == "reference":
            return self.config.data.max_reference_tokens
        return self.config.corpus.max_new_tokens

    def student_parameters(self) -> int:
        if self.config.student.model is not None:
            return self.student.num_parameters
        embedding = self.teacher.vocab_size * self.teacher.hidden_size
        if not self.teacher.config.get("tie_word_embeddings", False):
            embedding *= 2
        layers = self.teacher.config.get("num_hidden_layers", 1)
        share = (self.config.student.init.num_kept or layers) / layers
        return embedding + int(share * (self.teacher.num_parameters - embedding))

    def weights_in_memory(self) -> int:
        """Bytes of the weights of two pushes: the newest is written while engines still load the one before."""
        return 2 * 4 * self.student_parameters()

    def shared_memory(self) -> int:
        """Bytes of rows and weights in shared memory."""
        return min(self.config.replay.memory_bytes, self.window()) + self.weights_in_memory()

    def window(self) -> int:
        """Bytes of the rows of all updates in flight, with every response at its limit."""
        config = self.config
        plan = BatchPlan.of(config)
        updates = min(config.replay.max_policy_age + 2, config.learner.num_updates)
        samples = plan.prompts_per_update * config.rollout.samples_per_prompt if plan.may_use_student else 0
        students = samples * self._row_bytes(config.rollout.max_new_tokens)
        texts = plan.teacher_rows_per_update * self._row_bytes(self._teacher_text_limit)
        # When an update has one text or the other, chance or a growing share can pick the same every time.
        each = students + texts if plan.both_texts else max(students, texts)
        return updates * each

    def _row_bytes(self, response_tokens: int) -> int:
        """Bytes of a row with the longest prompt."""
        payload = 2 * self.scored.hidden_size if self.config.recipe.payload == "hidden" else 0
        return response_tokens * (payload + 16) + 4 * self.config.data.max_prompt_tokens + 512
