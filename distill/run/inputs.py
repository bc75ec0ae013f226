"""What the processes of a run start from: paths, counts and ids, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.replay.segments import FOLDER_PREFIX


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """The inputs of one run. It contains only plain values, because it crosses processes.

    ``deploy.run.prepare`` makes it; a stage that finds or trains a checkpoint returns a copy with the
    field replaced.
    """

    run_dir: str
    """The run folder."""
    run_id: str
    """Part of every name that two runs could share."""
    node: str
    """Name of the node whose shared memory contains the segments and the weights."""
    teacher_dir: str
    """The teacher's checkpoint."""
    scoring_dir: str
    """The checkpoint whose hidden states are the payload: the teacher's, or its proxy's once that is trained."""
    student_dir: str
    """The student's checkpoint: the one to start from, then the result of the warm start."""
    proxy_init: str | None
    """The proxy's checkpoint before its training; None when the student's is used, or no proxy."""
    train_prompts: str
    """Parquet: the prompt table for training."""
    heldout_prompts: str
    """Parquet: the held-out prompt table."""
    num_prompts: int
    """Rows of ``train_prompts``."""
    references: str | None
    """Parquet: the references of the training prompts as a corpus; None when the data has no references."""
    teacher_text: str
    """Parquet: the recipe's teacher text as a corpus. It has no rows when the recipe uses none, and the
    corpus stage writes it when it is sampled."""
    num_corpus_prompts: int
    """Training prompts that the teacher answers for ``teacher_text``; 0 when that text is not sampled."""
    heldout_corpus: str
    """Parquet: the teacher's text on the first held-out prompts."""
    shown_prompts: str
    """Parquet: the prompt table of the prompts whose greedy answers the report shows."""
    teacher_answers: str
    """JSON: the teacher's greedy answers to them, which the corpus stage writes."""
    stop_token_ids: tuple[int, ...]
    """Ids that end a text, from the teacher's generation config: engines and learner use the same ones."""
    num_tokens: int
    """Size of the vocabulary that the models have in common; each may be padded to a larger size."""

    @property
    def has_proxy(self) -> bool:
        return self.scoring_dir != self.teacher_dir

    @property
    def shared_memory(self) -> Path:
        """This run's folder in shared memory."""
        return shared_memory_root() / f"{FOLDER_PREFIX}{self.run_id}"

    @property
    def segments(self) -> Path:
        return self.shared_memory / "segments"

    @property
    def weights(self) -> Path:
        return self.shared_memory / "weights"


def shared_memory_root() -> Path:
    """The folder for segments and weights: /dev/shm, or /tmp on systems without it."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() else Path("/tmp")
