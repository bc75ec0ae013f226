"""Held-out evaluations: the rollout actors sample, the teacher actors score, the learner measures.

Nothing here computes with tensors. In lock-step an evaluation takes place between two updates, with the learner's
live weights. Otherwise the learner copies its weights, and goes on while the copy is measured; only a push has to wait
until the engines, which still have these weights, have sampled.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.run.training.fleet import Fleet, Member
from deploy.run.training.publisher import FleetPublisher
from deploy.run.training.room import Room
from distill.data import read_table
from distill.evaluation import Evaluation, save_evaluation
from distill.files import write_bytes
from distill.interfaces import SampleRef
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs


@dataclass(frozen=True)
class HeldoutSamples:
    """What a student has sampled for an evaluation."""

    samples: list[SampleRef]
    answers: list[list[int]] | None
    """Greedy answers to the shown prompts."""


class Evaluations:
    """Evaluates the student that the engines have, and keeps the results in the run folder."""

    def __init__(
        self,
        fleet: Fleet,
        publisher: FleetPublisher,
        folder: RunFolder,
        inputs: RunInputs,
        *,
        of_copy: bool,
        room: Room | None = None,
    ) -> None:
        """``of_copy``: measure a copy of the student, beside the updates. ``room``: waits while results do not fit."""
        self._room = room or Room(0.0)
        self._fleet = fleet
        self._publisher = publisher
        self._of_copy = of_copy
        self._folder = folder
        self._inputs = inputs

    async def evaluate(
        self,
        label: str,
        num_prompts: int,
        *,
        keep_answers: bool,
        on_copied: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Measure the student that engines and learner have now on the first held-out prompts.

        ``keep_answers``: also both models' greedy answers to the shown prompts, as text. ``on_copied`` is called when
        the learner may start its next update.
        """
        async with self._fleet.steady:
            return await self._measure(label, await self._sample(num_prompts, keep_answers, on_copied))

    async def _sample(
        self, num_prompts: int, keep_answers: bool, on_copied: Callable[[], None]
    ) -> HeldoutSamples:
        rollouts = self._fleet.rollouts
        async with self._publisher.pinned():
            if self._of_copy:
                await self._fleet.learner.copy_student()
                on_copied()
            samples = await self._divided(
                range(num_prompts), rollouts, lambda each, numbers: each.actor.sample_heldout(numbers)
            )
            answers = None
            if keep_answers:
                answers = await self._by(rollouts[0], lambda each: each.actor.answer_shown())
        return HeldoutSamples(samples, answers)

    async def _measure(self, label: str, heldout: HeldoutSamples) -> Evaluation:
        """Measure the student on what it has sampled, and keep the result."""
        learner, samples = self._fleet.learner, heldout.samples
        if await learner.num_teacher_rows() < len(samples):
            await learner.keep_teacher_text(await self._score_teacher_text(len(samples)))
        scored = await self._divided(
            samples, self._fleet.teachers, lambda each, part: each.actor.score_samples(part)
        )
        evaluation: Evaluation = await learner.measure(label, scored, self._of_copy)
        await self._room.of(lambda: save_evaluation(self._folder.evaluations, evaluation))
        if heldout.answers is not None:
            path = self._folder.evaluations / f"{label}-answers.json"
            texts = await asyncio.to_thread(shown_answers, self._inputs, heldout.answers)
            await self._room.of(lambda: write_bytes(path, json.dumps(texts, indent=1).encode()))
        await self._release()
        return evaluation

    async def keep_best(self, best: Mapping[str, Any]) -> None:
        """Write the student that was measured last as the best, with the numbers by which it is."""
        await self._room.of(lambda: self._fleet.learner.write_best(best, self._of_copy))

    async def check_teacher(self, num_texts: int) -> float:
        """Compare the teacher's engine with the learner; returns the total variation.

        Raises: ConfigError when the engine's teacher is another distribution than the learner's.
        """
        async with self._fleet.steady:
            samples = await self._score_teacher_text(num_texts)
            tv: float = await self._fleet.learner.check_teacher(samples)
            await self._release()
        return tv

    async def _score_teacher_text(self, num_rows: int) -> list[SampleRef]:
        return await self._divided(
            range(num_rows), self._fleet.teachers, lambda each, numbers: each.actor.score_heldout(numbers)
        )

    async def _release(self) -> None:
        """Let the actors give up what they wrote for the evaluation; of one that has failed, nothing is left to it."""
        members = {each.holder: each for each in [*self._fleet.rollouts, *self._fleet.teachers]}
        for member in members.values():
            try:
                await member.actor.release_heldout()
            except Exception as error:
                self._fleet.failed(member, error)

    async def _divided(
        self,
        things: Sequence[Any],
        members: Sequence[Member],
        work: Callable[[Member, list[Any]], Awaitable[list[SampleRef]]],
    ) -> list[SampleRef]:
        """Divide the work on some things among the members of a pool; returns the results in the order of the things."""
        members = list(members)  # the pool can change
        parts = [list(things[number :: len(members)]) for number in range(len(members))]
        results = await asyncio.gather(
            *(
                self._by(member, lambda each, part=part: work(each, part))
                for member, part in zip(members, parts, strict=True)
                if part
            )
        )
        return [results[place % len(members)][place // len(members)] for place in range(len(things))]

    async def _by(self, member: Member, work: Callable[[Member], Awaitable[Any]]) -> Any:
        """Let a member do some work, or its heir if it fails: with the same number it has the same part."""
        while True:
            member = await self._fleet.heir(member)
            try:
                return await work(member)
            except Exception as error:
                self._fleet.failed(member, error)
                if self._fleet.serves(member):  # it has left, so it has no heir
                    raise


def shown_answers(inputs: RunInputs, student_answers: Sequence[Sequence[int]]) -> list[dict[str, str]]:
    """The shown prompts with both models' answers; ``…`` marks an answer that the limit cut."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(inputs.teacher_dir, local_files_only=True)

    def text(tokens: Sequence[int]) -> str:
        ended = bool(tokens) and tokens[-1] in inputs.stop_token_ids
        return tokenizer.decode(tokens, skip_special_tokens=True) + ("" if ended else " …")

    prompts = read_table(inputs.shown_prompts)["prompt_text"].to_pylist()
    teacher_answers = json.loads(Path(inputs.teacher_answers).read_text())["answers"]
    rows = zip(prompts, teacher_answers, student_answers, strict=True)
    return [
        {"prompt": prompt, "teacher": text(teacher), "student": text(student)}
        for prompt, teacher, student in rows
    ]
