"""A package index on loopback for the real pip: tiny wheels and source archives, sent as slowly as a test wants."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BACKEND = '''"""A build backend that needs no package: its wheel contains only metadata."""
import pathlib, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name, version = pathlib.Path("PKG-INFO").read_text().splitlines()[1:3]
    name, version = name.split(": ")[1], version.split(": ")[1]
    file = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder) / file, "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", pathlib.Path("PKG-INFO").read_text())
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return file

build_editable = build_wheel
'''
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def metadata(name: str) -> str:
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"


def make_wheel(folder: Path, name: str, num_bytes: int = 1000) -> Path:
    """A wheel of about ``num_bytes`` that cannot be compressed, with the member ``NAME/payload``."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/payload", random.Random(0).randbytes(num_bytes))
        wheel.writestr(f"{info}/METADATA", metadata(name))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def make_source_archive(folder: Path, name: str) -> Path:
    """A source archive that builds without any other package, with the member ``NAME-1.0/payload``."""
    path = folder / f"{name}-1.0.tar.gz"
    files = {"pyproject.toml": PYPROJECT, "backend.py": BACKEND, "PKG-INFO": metadata(name), "payload": name}
    with tarfile.open(path, "w:gz") as archive:
        for file, text in files.items():
            member = tarfile.TarInfo(f"{name}-1.0/{file}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


@contextmanager
def package_index(folder: Path, seconds: float = 0.0) -> Iterator[dict[str, str]]:
    """Serve the archives in a folder, the largest in about ``seconds``; yields the environment for pip."""
    archives = {path.name: path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz"))}
    largest = max((path.stat().st_size for path in archives.values()), default=1)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/").split("/")[-1]
            prefix = f"{name.replace('-', '_')}-"
            links = [f'<a href="/files/{file}">{file}</a>' for file in archives if file.startswith(prefix)]
            if self.path.startswith("/files/"):
                body, kind = archives[name].read_bytes(), "application/octet-stream"
            else:
                body, kind = "".join(links).encode(), "text/html"
            self.send_response(200 if links or kind != "text/html" else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            piece = max(1, largest // 20)
            with suppress(ConnectionError):  # a test that stops pip
                for start in range(0, len(body), piece):
                    self.wfile.write(body[start : start + piece])
                    time.sleep(seconds / 20 if kind != "text/html" else 0)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield {
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
            "PIP_NO_CACHE_DIR": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
