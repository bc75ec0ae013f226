"""`distill replay-batch`: make an update that was not finite again, and find the first tensor that is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.errors import Diverged
from learner.process.first_nonfinite import Rows, TensorWatch, in_inputs, in_weights
from learner.process.update_file import About, UpdateFile, as_written


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a replay found."""

    about: About
    first: str | None
    """The first tensor that is not finite; None if everything is finite here."""

    @property
    def lines(self) -> list[str]:
        about = self.about
        rows = f"{len(about.trajectories)} rows from {about.trajectories[0]} to {about.trajectories[-1]}"
        head = (
            f"update {about.update} of run {about.run_id}, weights of version {about.policy_version}, stage {about.stage}, {rows}: "
            f"{about.error}"
        )
        if self.first is None:
            return [head, "everything is finite when this machine makes the update again"]
        return [head, f"the first tensor that is not finite is {self.first}"]


def replay_update(path: str | Path, device: str = "auto") -> Replayed:
    """Make the update of a file again: its inputs and weights are looked at first, then the forward and backward passes.

    Raises: ConfigError for a file that cannot be read.
    """
    file = UpdateFile.read(path)
    with as_written(path):
        distiller = file.distiller(device)
        batch = file.batch.to(distiller.student.device)
    rows = Rows(file.about.trajectories)
    reads_scores = distiller.config.recipe.payload != "text"
    first = next(in_inputs(batch, rows), None) if reads_scores else None
    first = first or next(in_weights(distiller), None)
    if first is None:
        watch = TensorWatch(distiller, batch, rows)
        try:
            with watch.watching():
                distiller.train_on(batch)
        except Diverged as error:
            # The norm of finite gradients can overflow where no operation of ours is watched.
            first = watch.first or f"the {error.name.removeprefix('the ')}: {error.value}"
    return Replayed(about=file.about, first=first)
