"""Builds the workers of the actors, with the engines that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import xxhash

from actors.corpus import ROWS_PER_CALL, CorpusWorker
from actors.rollout import RolloutWorker
from actors.shown import ShownPrompts
from actors.teacher import TeacherWorker
from distill.config import RolloutConfig, RunConfig
from distill.data import PromptTable, TextCorpus
from distill.interfaces import Generator, Holder, Teacher
from distill.run.inputs import RunInputs
from distill.run.store import open_store


async def build_generator(
    model_dir: str,
    rollout: RolloutConfig,
    *,
    max_model_tokens: int,
    stop_token_ids: Sequence[int],
    num_tokens: int | None,
    on_push: Literal["recompute", "keep_kv"],
    lock_step: bool,
    seed: int,
    metrics_name: str | None = None,
) -> Generator:
    """Start the engine that ``rollout.engine`` names."""
    if rollout.engine == "vllm":
        from actors.vllm_engine.generator import VllmGenerator

        return await VllmGenerator.start(
            model_dir,
            rollout,
            max_model_tokens=max_model_tokens,
            stop_token_ids=stop_token_ids,
            num_tokens=num_tokens,
            on_push=on_push,
            lock_step=lock_step,
            seed=seed,
            metrics_name=metrics_name,
        )
    from actors.transformers_engine import TransformersGenerator

    return await TransformersGenerator.start(
        model_dir,
        rollout,
        max_model_tokens=max_model_tokens,
        stop_token_ids=stop_token_ids,
        num_tokens=num_tokens,
        on_push=on_push,
    )


def engine_seed(run_seed: int, holder: Holder) -> int:
    """The seed of an engine's own generator. Replicas, and heirs of a dead one, must not repeat each other's noise."""
    return xxhash.xxh3_64_intdigest(f"{run_seed}/{holder}".encode()) & 0x7FFFFFFF


def engine_name(config: RunConfig, run_id: str, holder: Holder) -> str | None:
    """The name under which an engine publishes vLLM's metrics through Ray; None without Ray."""
    return f"{run_id}:{holder}" if config.cluster.backend == "ray" else None


async def build_teacher(config: RunConfig, model_dir: str, metrics_name: str | None = None) -> Teacher:
    """Start the engine that ``scoring.engine`` names."""
    if config.scoring.engine == "vllm":
        from actors.vllm_engine.teacher import VllmTeacher

        return await VllmTeacher.start(
            model_dir,
            config.scoring,
            max_model_tokens=config.max_model_tokens,
            lock_step=config.replay.lock_step,
            metrics_name=metrics_name,
        )
    from actors.transformers_engine import TransformersTeacher

    return await TransformersTeacher.start(
        model_dir, config.scoring, max_model_tokens=config.max_model_tokens
    )


async def build_rollout(config: RunConfig, inputs: RunInputs, holder: Holder) -> RolloutWorker:
    """Build a rollout worker and start its engine."""
    generator = await build_generator(
        inputs.student_dir,
        config.rollout,
        max_model_tokens=config.max_model_tokens,
        stop_token_ids=inputs.stop_token_ids,
        num_tokens=inputs.num_tokens,
        on_push=config.weights.on_push,
        lock_step=config.replay.lock_step,
        seed=engine_seed(config.seed, holder),
        metrics_name=engine_name(config, inputs.run_id, holder),
    )
    return RolloutWorker(
        prompts=PromptTable.read(
            inputs.train_prompts,
            samples_per_prompt=config.rollout.samples_per_prompt,
            max_new_tokens=config.rollout.max_new_tokens,
            # A generator for every request costs time, and an asynchronous run cannot be repeated anyway.
            seed=config.seed if config.replay.lock_step else None,
        ),
        heldout=PromptTable.read(
            inputs.heldout_prompts,
            samples_per_prompt=1,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=config.seed,
        ),
        shown=ShownPrompts.read(inputs.shown_prompts, config.rollout.max_new_tokens),
        generator=generator,
        store=open_store(config, inputs, str(holder)),
        holder=holder,
        capacity=max(1, config.rollout.max_num_seqs // config.rollout.samples_per_prompt),
        together=config.replay.lock_step,
    )


async def build_teacher_worker(
    config: RunConfig, inputs: RunInputs, holder: Holder, model_dir: str
) -> TeacherWorker:
    """Build a teacher worker for one model, the teacher or its proxy, and start its engine."""
    return TeacherWorker(
        corpus=TextCorpus.read(inputs.teacher_text),
        heldout_corpus=TextCorpus.read(inputs.heldout_corpus),
        teacher=await build_teacher(config, model_dir, engine_name(config, inputs.run_id, holder)),
        store=open_store(config, inputs, str(holder)),
        holder=holder,
        capacity=config.scoring.max_num_seqs,
        together=config.replay.lock_step,
        fills_payload=config.recipe.payload == "hidden",
    )


async def build_corpus_worker(
    config: RunConfig, teacher_dir: str, stop_token_ids: Sequence[int], num_tokens: int
) -> CorpusWorker:
    """Build a corpus worker and start the rollout engine on the teacher."""
    generator = await build_generator(
        teacher_dir,
        replace(config.rollout, max_num_seqs=ROWS_PER_CALL),
        max_model_tokens=config.max_model_tokens,
        stop_token_ids=stop_token_ids,
        num_tokens=num_tokens,
        on_push="recompute",
        lock_step=True,
        seed=config.corpus.seed,
    )
    return CorpusWorker(config.corpus, generator)
