"""Rows of the buffer as the learner sees them: the stop token counts, a cut text just ends."""

from __future__ import annotations

import pyarrow as pa
import pytest

from distill.schema import Trajectory, trajectory_batch
from learner.batch import token_batch
from learner.distiller import _text_metrics

STOP = 1


def group(*texts: tuple[list[int], str]) -> pa.RecordBatch:
    """Of the student, on one prompt of two tokens."""
    return trajectory_batch(
        [
            Trajectory(
                draw_id=f"text-{number}", source="student", prompt_index=0, sample_index=number,
                prompt_tokens=[7, 8], response_tokens=tokens, finish_reason=reason,
                behavior_logprobs=[-0.5] * len(tokens), policy_versions=[(0, 3)],
            )
            for number, (tokens, reason) in enumerate(texts)
        ]
    )  # fmt: skip


ENDED, CUT = ([5, 6, STOP], "stop"), ([5, 6, 4, 2], "length")


def test_the_stop_token_is_a_target_like_any_other():
    """Whether to end is a choice of the student's; the state after the last token is never used."""
    (pack,) = token_batch([group(ENDED, CUT)], micro_batch_tokens=100).packs
    by_row = {row: pack.targets[pack.row == row].tolist() for row in (0, 1)}
    assert by_row == {0: [5, 6, STOP], 1: [5, 6, 4, 2]}
    assert pack.counted.all()
    inputs = {row: pack.input_ids[pack.state_index[pack.row == row]].tolist() for row in (0, 1)}
    assert inputs == {0: [8, 5, 6], 1: [8, 5, 6, 4]}
    assert STOP not in pack.input_ids


def test_the_share_of_truncated_texts_is_a_metric():
    assert _text_metrics([group(ENDED, CUT), group(ENDED, ENDED)]) == {
        "policy/response_length": pytest.approx(3.25),
        "policy/truncated_share": 0.25,
    }
    assert _text_metrics([]) == {}
