"""The folder of one run: its paths, its identity, and the lock that makes the driver its holder.

The driver holds the folder; the actors, ``report`` and studies use its paths. A run exists once
``run.json`` does. All files written here are replaced atomically (:mod:`distill.files`), so neither
a reader nor a crash can see half a file.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.errors import ConfigError, DistillError
from distill.files import is_plain_name, is_temporary, remove_temporaries, write_bytes, write_json
from distill.redaction import redacted, redacted_values
from distill.room import needs_room
from distill.run.json_object import read_object

TRAINING_PROMPTS, HELDOUT_PROMPTS = "train.parquet", "heldout.parquet"
"""Files of the folder ``data`` with the parts of the prompt table."""
_IN_INPUTS = ("inputs_format", "inputs", "corpora", "versions")
_IN_IDENTITY = ("run_id", "incarnation", "fingerprint", "created_at")
_IN_SUMMARY = ("updates", "recipe", "before", "after", "timing_s", "peak_pss_bytes", "wall_s")


def checkpoint_steps(root: Path) -> list[int]:
    """Return the steps of the complete checkpoints ``step-N`` in a folder, ascending."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in root.glob("step-*")]
    return sorted(int(match[1]) for match in found if match)


class RunFolder:
    """The paths of a run, and after ``create`` the lock on its folder.

    The lock is the kernel's (flock on ``.lock``). The kernel releases it when the process ends,
    however that happens, so no stale lock can remain.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self.config = self.path / "config.yaml"
        self.settings = self.path / "settings.json"
        self.inputs = self.path / "inputs.json"
        self.metrics = self.path / "metrics.parquet"
        self.events = self.path / "events.jsonl"
        self.spans = self.path / "spans.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.summary = self.path / "summary.json"
        self.failure = self.path / "failure.json"
        self.traceback = self.path / "failure.txt"
        self.data = self.path / "data"
        self.replay = self.path / "replay"
        self.checkpoints = self.path / "checkpoints"
        self.nonfinite = self.path / "nonfinite"
        self.cut = self.path / "student-init"
        self.cut_layers = self.path / "student-init-layers.json"
        self.sft = self.path / "sft"
        self.student = self.path / "student"
        self.best = self.path / "best"
        self.evaluations = self.path / "evaluations"
        self.scale_request = self.path / "scale-request.json"
        self.scale_answer = self.path / "scale-answer.json"
        self.metrics_target = self.path / "prometheus-target.json"
        self._identity_file = self.path / "run.json"
        self.best_numbers = self.best / "best.json"
        self._lock_file = self.path / ".lock"
        self._lock: int | None = None
        self._is_ours = False
        """Whether it was opened as the folder of a run."""
        self.found_copy_of: str | None = None
        """The id of the run whose folder this is a copy of, if ``create`` noticed that."""

    @property
    def is_running(self) -> bool:
        """Whether a process, this one or another, holds the folder."""
        if self._lock is not None:
            return True
        try:
            with open(self._lock_file) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def evaluation(self, label: str) -> Path:
        """Return the file of an evaluation. Raises: ConfigError for a label, as of a checkpoint, that is a path."""
        if not is_plain_name(label):
            must, remedy = "be a name such as step-10", "bring the checkpoint back from a copy"
            raise ConfigError("label of an evaluation", repr(label), must, remedy)
        return self.evaluations / f"{label}.parquet"

    @property
    def steps(self) -> list[int]:
        """The updates after which there is a checkpoint, ascending."""
        return checkpoint_steps(self.checkpoints)

    @property
    def has_prompts(self) -> bool:
        """Whether the prompt table has been written, so that later incarnations use it."""
        return all((self.data / name).exists() for name in (TRAINING_PROMPTS, HELDOUT_PROMPTS))

    @property
    def resume_command(self) -> str:
        """The command that continues the run, for a shell."""
        return f"distill train --resume {shlex.quote(str(self.path))}"

    # Opening

    def create(self, config_yaml: str, fingerprint: str, last_fingerprint: str | None = None) -> bool:
        """Take the folder for a run of this configuration; returns True when it resumes a run.

        ``fingerprint``: the hash of the settings that a resumed run must keep. ``last_fingerprint``: that of the same
        settings with the paths of the last start, if data or models have been moved since. On resuming, ``config_yaml``
        replaces ``config.yaml``, because the other settings can have changed.

        Raises: ConfigError when another process holds the folder, or when the folder contains a run
        of a different configuration, or other files.
        """
        self._make_folder()
        self._take_lock()
        try:
            resumes = self.exists
            if resumes:
                known = self._identity()["fingerprint"]
                if known not in (fingerprint, last_fingerprint):
                    remedy = "choose another run_dir, or use `distill train --resume` to continue that run with its own configuration"
                    must = f"be new or contain a run of this configuration (fingerprint {fingerprint}, but it has {known})"
                    raise ConfigError("run_dir", self.path, must, remedy)
            else:
                self.refuse_foreign_files()
            write_bytes(self.config, config_yaml.encode())
            self._begin_incarnation(fingerprint)
            self._is_ours = True
        except BaseException:
            self.close()
            raise
        return resumes

    def close(self) -> None:
        """Release the lock; the folder can be opened again. What shared memory had no room for is removed."""
        if self._lock is not None:
            if self._is_ours:  # another folder with such a name may be somebody's data
                shutil.rmtree(self.replay, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def exists(self) -> bool:
        return self._identity_file.is_file()

    def require(self) -> None:
        """Raises: ConfigError when the folder contains no run."""
        if not self.exists:
            remedy = "check the path, or start one with `distill train`"
            raise ConfigError("run_dir", self.path, "be the folder of a run (it has no run.json)", remedy)

    # Identity

    @property
    def run_id(self) -> str:
        """Eight hexadecimal digits, drawn once when the run was created, and again for a copy of its folder.
        Names of shared memory, Ray namespaces and metrics contain them."""
        return self._identity()["run_id"]

    @property
    def incarnation(self) -> int:
        """How often the run was started, including this time."""
        return self._identity()["incarnation"]

    @property
    def fingerprint(self) -> str:
        return self._identity()["fingerprint"]

    # Files

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._require_lock()
        write_json(self.summary, summary)

    def read_summary(self) -> dict[str, Any] | None:
        """Return the summary; None before the run has ended once.

        Raises: ConfigError when the file is not a summary.
        """
        if not self.summary.is_file():
            return None
        remedy = f"remove it, and let `{self.resume_command}` write it again"
        return read_object("summary", self.summary, _IN_SUMMARY, remedy)

    def read_inputs(self) -> dict[str, Any] | None:
        """Return the record of the run's inputs; None where an earlier version began the run.

        Raises: ConfigError when the file is not such a record.
        """
        if not self.inputs.is_file():
            return None
        return read_object("inputs", self.inputs, _IN_INPUTS, self.inputs_remedy)

    @property
    def inputs_remedy(self) -> str:
        """What to do about a record of the inputs that cannot be used."""
        return (
            "bring it back from a copy; or delete it, if data and models are those that the run began with, "
            f"and let `{self.resume_command}` record them anew"
        )

    def remove_results(self) -> None:
        """Remove what a run wrote at its end, because it continues to a later one."""
        self._require_lock()
        answers = self.evaluations / "after-answers.json"
        for result in (self.summary, self.evaluation("after"), answers):
            result.unlink(missing_ok=True)

    def write_failure(self, error: Exception) -> None:
        """Record why the run failed: ``failure.json`` as data, ``failure.txt`` with the traceback, without credentials."""
        if not isinstance(error, DistillError):
            error_parts: dict[str, Any] = {
                "code": "unexpected",
                "message": f"{type(error).__name__}: {error}",
            }
        else:
            error_parts = error.parts()
        write_json(self.failure, redacted_values(error_parts))
        text = redacted("".join(traceback.format_exception(error)))
        write_bytes(self.traceback, text.encode(errors="replace"))

    def read_failure(self) -> dict[str, Any] | None:
        """Return the parts of the error that ended the last incarnation; ``code`` names its kind."""
        if not self.failure.is_file():
            return None
        return read_object(
            "failure", self.failure, ("code",), "remove it, because the next start removes it as well"
        )

    def write_metrics_target(self, address: str) -> None:
        """Record where Prometheus finds the numbers of this run, in its format for discovery by files."""
        write_bytes(self.metrics_target, json.dumps([{"targets": [address]}]).encode())

    def read_best(self) -> dict[str, Any] | None:
        """Return the update, metric and value of the student in ``best/``; None before an evaluation during training."""
        if not self.best_numbers.is_file():
            return None
        remedy = "remove it; the next evaluation writes it again"
        return read_object("best", self.best_numbers, ("update", "metric", "value"), remedy)

    # Steps of opening

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            must = f"be a folder that can be created ({error.strerror})"
            raise ConfigError("run_dir", self.path, must, "choose another run_dir") from error

    def _take_lock(self) -> None:
        if self._lock is not None:
            raise RuntimeError(f"{self.path} is already open")
        try:
            lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            must = f"be a writable folder ({error.strerror})"
            raise ConfigError("run_dir", self.path, must, "choose another run_dir") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 256, 0).decode(errors="replace").strip() or "another process"
            os.close(lock)
            must = f"be used by one process at a time ({holder} uses it)"
            remedy = "wait for it, stop it, or choose another run_dir"
            raise ConfigError("run_dir", self.path, must, remedy) from error
        os.ftruncate(lock, 0)
        with needs_room(self._lock_file):
            os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock = lock

    def _require_lock(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path} must be opened by create before it is written")

    def refuse_foreign_files(self) -> None:
        """Raises: ConfigError when the folder exists and contains files but no run."""
        if self.exists or not self.path.is_dir():
            return
        # config.yaml without run.json: an earlier start died in between.
        ours = {self._lock_file.name, self.config.name, self.settings.name}
        others = sorted(name for name in os.listdir(self.path) if name not in ours and not is_temporary(name))
        if others:
            must = f"be new, empty, or the folder of a run (it contains {others[0]})"
            raise ConfigError("run_dir", self.path, must, "choose another run_dir")

    def _begin_incarnation(self, fingerprint: str) -> None:
        for folder in (self.path, self.data, self.checkpoints, self.nonfinite, self.evaluations):
            remove_temporaries(folder)
        shutil.rmtree(self.replay, ignore_errors=True)  # no one knows what an earlier incarnation left there
        for failure in (self.failure, self.traceback):  # of an earlier incarnation
            failure.unlink(missing_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        before: dict[str, Any] = {"run_id": secrets.token_hex(4), "created_at": now, "incarnation": 0}
        if self.exists:
            before = self._identity()
        place = _place_of(self.path)
        if not _is_same_folder(before.get("folder", place), place):
            self.found_copy_of = before["run_id"]
            before |= {"run_id": secrets.token_hex(4), "copied_from": self.found_copy_of}
        origin = {"copied_from": before["copied_from"]} if "copied_from" in before else {}
        identity = {
            "run_id": before["run_id"],
            **origin,
            "folder": place,
            "incarnation": before["incarnation"] + 1,
            "fingerprint": fingerprint,
            "created_at": before["created_at"],
            "started_at": now,
        }
        write_json(self._identity_file, identity)

    def _identity(self) -> dict[str, Any]:
        self.require()
        remedy = "start the run again in another run_dir, because only this file identifies it"
        return read_object("run", self._identity_file, _IN_IDENTITY, remedy)


def _place_of(folder: Path) -> dict[str, Any]:
    status = folder.stat()
    return {"path": str(folder), "device": status.st_dev, "inode": status.st_ino}


def _is_same_folder(recorded: Any, place: Mapping[str, Any]) -> bool:
    """Whether a folder is the one of which ``recorded`` was written, perhaps moved, and not a copy of it.

    A copy has an inode of its own, while the original keeps its inode when it is moved. An inode counts within a
    device, but the number of a network file system's device differs between machines and mounts, so the same path
    is accepted instead. A folder that was moved to another file system is a copy, and so is one from a backup.
    """
    if not isinstance(recorded, dict) or recorded.get("inode") != place["inode"]:
        return False
    return any(recorded.get(name) == place[name] for name in ("device", "path"))
