"""The learner's teacher is the engine's: the estimate against enumeration, and the check on a real engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors.corpus import write_corpus
from actors.teacher import TeacherWorker
from actors.transformers_engine import TransformersGenerator, TransformersTeacher
from distill.config import RolloutConfig, ScoringConfig
from distill.data import PromptTable, TextCorpus
from distill.data.prompts import PROMPT_SCHEMA
from distill.errors import ConfigError
from distill.interfaces import Holder
from distill.replay.segments import SegmentStore
from learner.model.head import Head
from learner.process.teacher_check import check_teacher, total_variation
from tests.tiny import save_tiny_llama


def test_the_estimate_is_unbiased() -> None:
    """Its expectation over all tokens, by enumeration, is the total variation; each sample is one term."""
    random = np.random.default_rng(0)
    for _ in range(50):
        p, q = (random.dirichlet(np.full(7, 0.3)) for _ in range(2))
        terms = [total_variation(np.log(p[[token]]), np.log(q[[token]])) for token in range(7)]
        assert p @ np.array(terms) == pytest.approx(np.abs(p - q).sum() / 2, abs=1e-12)


def test_equal_probabilities_have_no_distance() -> None:
    assert total_variation(np.array([-1.0, -200.0]), np.array([-1.0, -200.0])) == 0.0
    assert total_variation(np.array([-1.0]), np.array([-np.inf])) == 1.0


@pytest.fixture
async def checked(tmp_path: Path):
    """A teacher, its corpus from a real engine, and a scorer over it."""
    teacher = save_tiny_llama(tmp_path / "teacher")
    columns = {name: [None] * 4 for name in PROMPT_SCHEMA.names}
    columns |= {
        "prompt_tokens": [[5, 6, 7], [8], [9, 10], [11]],
        "prompt_text": [""] * 4,
        "heldout": [True] * 4,
        "data_row": [0, 1, 2, 3],
    }
    prompts = PromptTable(
        pa.table(columns, schema=PROMPT_SCHEMA), samples_per_prompt=1, max_new_tokens=24, seed=0
    )
    generator = await TransformersGenerator.start(
        str(teacher), RolloutConfig(dtype="float32"), max_model_tokens=64, stop_token_ids=[1]
    )
    corpus = tmp_path / "corpus.parquet"
    await write_corpus(prompts, 4, generator, corpus, rows_per_call=4, progress=lambda *_: None)
    await generator.close()
    store = SegmentStore(
        memory_dir=tmp_path / "shm",
        spill_dir=tmp_path / "spill",
        writer_id="teacher",
        node="local",
        segment_bytes=1 << 20,
        memory_bytes=1 << 20,
    )
    rows = TextCorpus.read(corpus)
    engine = await TransformersTeacher.start(
        str(teacher), ScoringConfig(dtype="float32"), max_model_tokens=64
    )
    scorer = TeacherWorker(
        corpus=rows,
        heldout_corpus=rows,
        teacher=engine,
        store=store,
        holder=Holder("teacher", 0),
        capacity=4,
        together=True,
        fills_payload=True,
    )
    scored = [store.read(sample) for sample in await scorer.score_heldout(range(4))]
    yield scored, str(corpus), Head.from_checkpoint(teacher)
    await scorer.close()


def test_the_teacher_that_sampled_is_recognised(checked) -> None:
    scored, corpus, head = checked
    assert check_teacher(scored, corpus, head) < 0.01


@pytest.mark.parametrize("fault", ["other head", "scale", "soft-cap"])
def test_another_distribution_is_refused(checked, fault: str) -> None:
    scored, corpus, head = checked
    wrong = {
        "other head": replace(head, weight=head.weight.flip(0)),
        "scale": replace(head, transform=replace(head.transform, scale=0.25)),
        "soft-cap": replace(head, transform=replace(head.transform, softcap=1.0)),
    }[fault]
    with pytest.raises(
        ConfigError, match=r"^scoring\.check=a total variation of 0\.\d+ must be at most 0\.05 "
    ):
        check_teacher(scored, corpus, wrong)
