"""The counter of weight pushes of a run."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from distill.errors import ConfigError
from distill.files import write_json
from distill.run.json_object import read_object


class PolicyVersionCounter:
    """The counter of weight pushes, ``policy_version.json`` in a run folder.

    Any process of the run may use it (the learner does not hold the folder), even while a process
    that was presumed dead still uses it.
    """

    def __init__(self, run_dir: str | Path):
        self._file = Path(run_dir) / "policy_version.json"

    @property
    def last(self) -> int:
        """The newest version that was returned; 0 before the first."""
        if not self._file.is_file():
            return 0
        remedy = "bring the run folder back from a copy, because a version must never be used twice"
        version = read_object("policy_version", self._file, ("policy_version",), remedy)["policy_version"]
        if type(version) is not int or version < 0:
            raise ConfigError(
                f"policy_version in {self._file}", repr(version), "be a whole number >= 0", remedy
            )
        return version

    def next(self) -> int:
        """Return a number that this run has never used before, from 1.

        It is on disk before it is returned, so after a crash no other weights get a version that
        was, or could have been, published. Numbers can be skipped but are never repeated.
        """
        guard = os.open(
            self._file.with_name(".policy_version.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            version = self.last + 1
            write_json(self._file, {"policy_version": version})
            return version
        finally:
            os.close(guard)
