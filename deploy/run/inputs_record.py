"""``inputs.json`` in a run folder: fingerprints of the data, the models and the corpora of the run.

A resumed run is compared with it before anything starts, because half a run on other data is no run that anyone
could repeat. Only content counts: an input may be moved if the configuration has its new place, and times of files
do not matter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from deploy.fetch import cache_dir
from deploy.run.identity import checkpoint_fingerprint, file_fingerprint, text_files
from deploy.run.preflight import models
from deploy.version import recorded_versions
from distill.config import DataConfig, RunConfig
from distill.data.sources import data_files, read_rows
from distill.errors import ConfigError
from distill.files import NOT_AS_WRITTEN, write_json
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs

FORMAT = 1
_WEIGHTS = "config.json and weights"


@dataclass(frozen=True, kw_only=True)
class InputPart:
    """Something that a run depends on: a data file, the weights of a checkpoint, a file beside them, a corpus."""

    place: str
    """Its file or folder, or the id of a data set."""
    num_bytes: int | None
    """None where the fingerprint is not over files."""
    fingerprint: str

    def __str__(self) -> str:
        size = f"{self.num_bytes} bytes in " if self.num_bytes is not None else ""
        return f"{self.fingerprint[:16]} ({size}{self.place})"


Parts = Mapping[str, InputPart]
"""Parts by name. The name of a part of data or a model begins with its setting, as ``teacher.model (tokenizer.json)``."""
Difference = tuple[str, InputPart | None, InputPart | None]
"""Name, the part that was recorded and the one that is there; None where it is missing."""


@dataclass(frozen=True, kw_only=True)
class InputsRecord:
    """The content of ``inputs.json``."""

    inputs: Parts
    """Of data and models."""
    corpora: Parts
    """The cached corpora. It is empty until the run has prepared its prompts."""
    versions: Mapping[str, str]
    """Of the packages at the last start."""

    @classmethod
    def read(cls, folder: RunFolder) -> InputsRecord | None:
        """Read the record of a run; None where an earlier version began it.

        Raises: ConfigError when the file is not a record of this format.
        """
        found = folder.read_inputs()
        if found is None:
            return None
        if found["inputs_format"] != FORMAT:
            must = f"be {FORMAT}, the format of this version of distill"
            remedy = f"resume the run with the version that wrote {folder.inputs}, or {folder.inputs_remedy}"
            raise ConfigError("inputs_format", found["inputs_format"], must, remedy)
        try:
            return cls(
                inputs=_parts(found["inputs"]),
                corpora=_parts(found["corpora"]),
                versions={str(name): str(version) for name, version in found["versions"].items()},
            )
        except NOT_AS_WRITTEN as error:
            must = f"be a record of a run's inputs ({type(error).__name__}: {error})"
            raise ConfigError("inputs", folder.inputs, must, folder.inputs_remedy) from None

    def write(self, folder: RunFolder) -> None:
        write_json(folder.inputs, {"inputs_format": FORMAT, **asdict(self)})


def input_parts(config: RunConfig) -> dict[str, InputPart]:
    """Fingerprint the data and the models of a configuration, as they are now.

    A hub id is looked up in the hub's cache when the hub cannot be reached.

    Raises: ConfigError when one is missing or is no checkpoint.
    """
    parts = dict(_data_parts(config.data))
    roles = ["teacher", "student", *(["proxy"] if config.recipe.teacher_gives != "probabilities" else [])]
    for role in roles:
        model = getattr(config, role)
        if model.model is not None:  # else the student is cut from the teacher, or the proxy is the student
            setting = f"{role}.model"
            parts |= _model_parts(setting, models.read(model.model, model.revision, setting).folder)
    return parts


def teacher_fingerprint(parts: Parts) -> str:
    """The fingerprint of the teacher's checkpoint, which the names of cached corpora contain."""
    return parts[f"teacher.model ({_WEIGHTS})"].fingerprint


def corpus_parts(config: RunConfig, inputs: RunInputs) -> dict[str, InputPart]:
    """The corpora of a run. Their files are named by their keys, and need not be written yet."""
    files = {"corpus (held-out)": Path(inputs.heldout_corpus)}
    if config.recipe.teacher_text == "sampled":
        files["corpus (training)"] = Path(inputs.teacher_text)
    return {
        name: InputPart(place=str(file), num_bytes=None, fingerprint=file.stem)
        for name, file in files.items()
    }


def differences(recorded: Parts, found: Parts) -> list[Difference]:
    """The parts that are not as they were, in the order of ``found``, then those that are gone."""
    names = [*found, *(name for name in recorded if name not in found)]
    pairs = [(name, recorded.get(name), found.get(name)) for name in names]
    return [
        (name, then, now)
        for name, then, now in pairs
        if then is None or now is None or then.fingerprint != now.fingerprint
    ]


def keep_corpora(folder: RunFolder, config: RunConfig, inputs: RunInputs) -> None:
    """Compare the corpora with the recorded ones, and record them at the first start.

    Raises: ConfigError that names those which are others. Their names follow from what is compared before, except for
    the number format: ``auto`` can stand for another one on another machine.
    """
    record = InputsRecord.read(folder)
    assert record is not None  # train has written it
    found = corpus_parts(config, inputs)
    changed = differences(record.corpora, found) if record.corpora else []
    if changed:
        name, then, now = changed[0]
        also = "".join(f"; {other}={new} was {old}" for other, old, new in changed[1:])
        remedy = (
            f"resume the run on a machine where rollout.dtype={config.rollout.dtype} is the number format that it was "
            "there, and with the same version of distill, or choose another run_dir for a new run"
        )
        raise ConfigError(
            name, now, f"stay {then}, as it was when the run in {folder.path} began{also}", remedy
        )
    InputsRecord(inputs=record.inputs, corpora=found, versions=record.versions).write(folder)


def version_changes(record: InputsRecord) -> str:
    """What is installed in another version than at the last start, in words; empty if nothing is."""
    now = recorded_versions()
    names = sorted({*record.versions, *now})
    changed = [
        f"{name} {now.get(name, 'is missing')} (it was {record.versions.get(name, 'missing')})"
        for name in names
        if record.versions.get(name) != now.get(name)
    ]
    return ", ".join(changed)


def _data_parts(data: DataConfig) -> Iterator[tuple[str, InputPart]]:
    files = data_files(data.path, data.split, cache_dir())
    if files is None:  # the hub's files are not known here, so its rows are hashed
        state = xxhash.xxh3_128()
        for row in read_rows(data.path, data.split, cache_dir()):
            state.update(json.dumps(row, sort_keys=True, default=str).encode())
        place = f"{data.path}, split {data.split}"
        yield "data.path", InputPart(place=place, num_bytes=None, fingerprint=state.hexdigest())
    elif len(files) == 1:
        yield "data.path", _file_part(files[0])
    else:
        base = os.path.commonpath([file.parent for file in files])
        for file in files:
            yield f"data.path ({file.relative_to(base)})", _file_part(file)


def _model_parts(setting: str, folder: Path) -> dict[str, InputPart]:
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    weights = InputPart(place=str(folder), num_bytes=num_bytes, fingerprint=checkpoint_fingerprint(folder))
    beside = {f"{setting} ({file.relative_to(folder)})": _file_part(file) for file in text_files(folder)}
    return {f"{setting} ({_WEIGHTS})": weights, **beside}


def _file_part(file: Path) -> InputPart:
    return InputPart(
        place=str(file.absolute()), num_bytes=file.stat().st_size, fingerprint=file_fingerprint(file)
    )


def _parts(found: Mapping[str, Any]) -> dict[str, InputPart]:
    """Raises: one of ``NOT_AS_WRITTEN``."""
    parts = {str(name): InputPart(**part) for name, part in found.items()}
    for name, part in parts.items():
        if not isinstance(part.fingerprint, str) or not isinstance(part.place, str):
            raise ValueError(f"the fingerprint and the place of {name} must be text")
    return parts
