"""The file of an update whose numbers were not finite: everything that is needed to make it again.

Written by :mod:`learner.process.skips` into ``nonfinite/`` of the run folder, and read by `distill replay-batch`
(:mod:`learner.process.replay_update`), on this machine or another: it names no path.

It is one safetensors file, without pickle:

| tensors                      | what                                                                        |
|------------------------------|-----------------------------------------------------------------------------|
| ``pack.<n>.<field>``         | the batch as the update received it (:class:`learner.batch.Pack`)           |
| ``group``                    | the group of each row                                                       |
| ``student.<name>``           | the student's weights before the update, float32                            |
| ``critic…``                  | the critics and their Adam before the update, where critics are learned     |
| ``teacher.weight``, ``.bias``| the head that turns the teacher's states into its distribution              |

The metadata has one entry, ``distill.update``, in JSON: format, what was not finite, the trajectories of the rows,
the configuration as YAML, the student's architecture, the counts of the batch, and a checksum of the tensors.

Why the weights. A checkpoint is some updates older, and the numbers of an update depend on the weights to the last bit. The
student's own optimizer is left out, because its step comes after everything that can fail. So a file is about a third
of a checkpoint, plus the batch. The critics' Adam is needed, because an update takes several steps with them. The head is no
larger than the student's own.

:data:`KEPT` files are kept, the run's first and its newest: the first shows the cause, and what follows is often
its consequence. They take about as much disk as one checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.config import RunConfig
from distill.config.load import read_config
from distill.config.tree import to_yaml
from distill.errors import ConfigError, DistillError, first_line
from distill.files import NOT_AS_WRITTEN, replacing_file
from learner.batch import Pack, TokenBatch
from learner.distiller import Distiller
from learner.model.head import Head, LogitTransform
from learner.model.student import Student

FORMAT_VERSION = 1
KEPT = 3
"""Files that a run keeps."""
_KEY = "distill.update"
_COUNTS = (
    "num_teacher_tokens",
    "num_student_tokens",
    "num_teacher_rows",
    "num_student_rows",
    "num_input_tokens",
)


@dataclass(frozen=True, kw_only=True)
class About:
    """What a file says of its update."""

    run_id: str
    update: int
    """Counted from 1, as in ``metrics.parquet``."""
    policy_version: int
    """Version of the weights that the update began with."""
    stage: str
    """scores, critics or student."""
    error: str
    """What was not finite."""
    trajectories: tuple[str, ...]
    """``trajectory_id`` of each row of the batch."""


def update_path(folder: Path, update: int, stage: str) -> Path:
    return folder / f"update-{update}-{stage}.safetensors"


def write_update(folder: Path, about: About, distiller: Distiller, batch: TokenBatch) -> Path:
    """Write the file of an update that has failed, and remove those beyond :data:`KEPT`.

    ``distiller``: as it was before the update, which is how a failed update leaves it. Raises: OSError.
    """
    head = distiller.teacher
    tensors = {"group": batch.group, "teacher.weight": head.weight} | distiller.student.tensors()
    if head.transform.bias is not None:
        tensors["teacher.bias"] = head.transform.bias
    if distiller.critics is not None:
        tensors |= distiller.critics.state_dict()
    for number, pack in enumerate(batch.packs):
        for name, value in vars(pack).items():
            if value is not None:
                tensors[f"pack.{number}.{name}"] = torch.as_tensor(value)
    facts = {
        "format_version": FORMAT_VERSION,
        "about": asdict(about),
        "config": to_yaml(distiller.config),
        "architecture": distiller.student.model.config.to_json_string(),
        "precision": str(distiller.student.precision).removeprefix("torch."),
        "head": {"scale": head.transform.scale, "softcap": head.transform.softcap},
        "counts": {name: getattr(batch, name) for name in _COUNTS},
        "num_packs": len(batch.packs),
    }
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    facts["xxh3"] = _checksum(plain)
    path = update_path(folder, about.update, about.stage)
    with replacing_file(path) as temporary:
        save_file(plain, temporary, metadata={_KEY: json.dumps(facts)})
    for old in _files(folder)[1 : 1 - KEPT]:
        old.unlink(missing_ok=True)
    return path


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-64 over names, types, shapes and bytes, hexadecimal: a changed bit would make another update."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The files of a run in the order of their updates."""
    found = [(re.fullmatch(r"update-(\d+)-\w+\.safetensors", path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


@contextmanager
def as_written(path: str | Path) -> Iterator[None]:
    """Raises: ConfigError for what reading the parts of a damaged file raises."""
    try:
        yield
    except DistillError:
        raise
    except (RuntimeError, *NOT_AS_WRITTEN) as error:
        must = f"be as a run wrote it ({first_line(error)})"
        raise ConfigError("file", path, must, "take another file of the run; this one is damaged") from None


@dataclass(frozen=True)
class UpdateFile:
    """A file that was read."""

    about: About
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: str | Path) -> UpdateFile:
        """Raises: ConfigError for a file that is not there, torn, of another kind, or of another version."""
        path = Path(path)
        remedy = "name a file of the folder nonfinite in a run's folder"
        try:
            with as_written(path), safe_open(path, framework="pt") as file:
                written = (file.metadata() or {}).get(_KEY)
                if written is None:
                    must = "be the batch of an update that a run wrote (it is another safetensors file)"
                    raise ConfigError("file", path, must, remedy)
                facts = json.loads(written)
                if facts["format_version"] != FORMAT_VERSION:
                    raise ConfigError(
                        f"format_version of {path}",
                        facts["format_version"],
                        f"be {FORMAT_VERSION}",
                        "replay it with the version of distill that wrote it",
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except OSError as error:
            raise ConfigError(
                "file", path, f"be readable ({error.strerror or first_line(error)})", remedy
            ) from None
        except SafetensorError as error:
            must = f"be a whole safetensors file ({first_line(error)})"
            raise ConfigError("file", path, must, "take another file of the run; this one is torn") from None
        if facts.get("xxh3") != _checksum(tensors):
            must = "have the checksum that it was written with"
            raise ConfigError("file", path, must, "take another file of the run; this one is damaged")
        with as_written(path):
            about = facts["about"] | {"trajectories": tuple(facts["about"]["trajectories"])}
            return cls(About(**about), facts, tensors)

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(self.facts["config"])
            return read_config(path)

    @property
    def batch(self) -> TokenBatch:
        """The batch, on the CPU."""
        packs = []
        for number in range(self.facts["num_packs"]):
            values: dict[str, Any] = {
                field.name: self.tensors.get(f"pack.{number}.{field.name}") for field in fields(Pack)
            }
            values["sequence_lengths"] = tuple(values["sequence_lengths"].tolist())
            packs.append(Pack(**values))
        return TokenBatch(packs=tuple(packs), group=self.tensors["group"], **self.facts["counts"])

    def distiller(self, device: str = "auto") -> Distiller:
        """Student and critics as they were before the update."""
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(self.facts["architecture"])
            student = Student(folder, precision=self.facts["precision"], device=device, random=True)
        tensors = dict(self.tensors)
        student.load_tensors(tensors)
        head = Head(tensors["teacher.weight"], LogitTransform(**self.facts["head"]))
        if (bias := tensors.get("teacher.bias")) is not None:
            head = replace(head, transform=replace(head.transform, bias=bias.to(student.device)))
        head = replace(head, weight=head.weight.to(student.device))
        distiller = Distiller(self.config, student, head)
        if distiller.critics is not None:
            distiller.critics.load_state_dict(tensors)
        distiller.updates_done = self.about.update - 1
        return distiller
