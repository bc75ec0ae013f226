"""Opens the segment store of one process of a run."""

from __future__ import annotations

from distill.config import RunConfig
from distill.replay.segments import SegmentStore
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs


def open_store(config: RunConfig, inputs: RunInputs, writer_id: str) -> SegmentStore:
    """Open the store that writes this process's segment files and reads those of every process."""
    return SegmentStore(
        memory_dir=inputs.segments,
        spill_dir=RunFolder(inputs.run_dir).replay,
        writer_id=writer_id,
        node=inputs.node,
        segment_bytes=config.replay.segment_bytes,
        memory_bytes=config.replay.memory_bytes,
        wait_for_room_s=config.checkpoint.wait_for_room_s,
    )
