"""What a run's actors start from: paths and ids, decided once by the composition root."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Plain values only: it crosses processes."""

    run_dir: str
    """The run folder."""
    run_id: str
    """Carried by every name that two runs could share."""
    node: str
    """Name of the node whose shared memory holds segments and weights."""
    teacher_dir: str
    """The teacher's checkpoint."""
    scoring_dir: str
    """The checkpoint whose states are the payload: the teacher's, or its proxy's."""
    student_dir: str
    """The checkpoint that distillation starts from (after the warm start)."""
    train_prompts: str
    """Parquet: the prompt table of training."""
    heldout_prompts: str
    """Parquet: the held-out prompt table."""
    text_corpus: str
    """Parquet: the recipe's off-policy text, in the trajectory schema; may have no rows."""
    heldout_corpus: str
    """Parquet: the teacher's text on the first held-out prompts."""
    stop_token_ids: tuple[int, ...]
    """Ids that end a text, of the teacher's generation config: one list for engine and learner."""

    num_tokens: int
    """Vocabulary that both models have: they may pad theirs to different sizes."""

    @property
    def has_proxy(self) -> bool:
        return self.scoring_dir != self.teacher_dir

    @property
    def shared_memory(self) -> Path:
        """This run's folder in shared memory."""
        return shared_memory_root() / f"distill-{self.run_id}"

    @property
    def segments(self) -> Path:
        return self.shared_memory / "segments"

    @property
    def weights(self) -> Path:
        return self.shared_memory / "weights"


def shared_memory_root() -> Path:
    """Where segments and weights lie: /dev/shm, or the temporary folder of systems without it."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() else Path("/tmp")
