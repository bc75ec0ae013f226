"""A browser opens the page of a run without complaint, in the forms that readers see."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.report.run_files import read_run
from deploy.report.run_page import write_page
from tests import pictures
from tests.unit.deploy.run_folders import HOSTILE, run_folder

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install -y chromium")
DARK = "--blink-settings=preferredColorScheme=0"


def opened(page: Path, folder: Path, *options: str) -> tuple[np.ndarray, str]:
    """The first screen of a page as grey values, and what the browser's console says."""
    shot = folder / "shot.png"
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", f"--user-data-dir={folder}/profile",
        f"--screenshot={shot}", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.is_file(), done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    with Image.open(shot) as image:
        return np.asarray(image.convert("L"), dtype=float), console


@pytest.mark.parametrize("options", [("--window-size=390,844",), ("--window-size=1200,2400", DARK)], ids=str)
def test_a_browser_shows_the_page(options: tuple[str, ...], tmp_path: Path):
    page = write_page(read_run(run_folder(tmp_path / "run", text=HOSTILE).path))
    grey, console = opened(page, tmp_path, *options)
    assert console == ""
    assert grey.std() > 10  # text and lines on a ground
    assert (grey.mean() < 100) == (DARK in options)


def test_a_blocked_script_would_be_seen_on_the_console(tmp_path: Path):
    page = write_page(read_run(run_folder(tmp_path / "run").path), tmp_path / "page.html")
    page.write_text(page.read_text().replace("<main>", "<main><script>1</script>"))
    assert "Content Security Policy" in opened(page, tmp_path, "--window-size=390,844")[1]


def test_the_picture_of_the_readme_is_small_and_can_be_drawn_again(tmp_path: Path):
    """By `python -m tests.pictures runs/demo`. What it shows changes with the run; its size and form do not."""
    pictures.draw(run_folder(tmp_path / "run").path, tmp_path / "report.png")
    for picture in (pictures.PICTURE, tmp_path / "report.png"):
        assert picture.stat().st_size < pictures.LARGEST_BYTES
        with Image.open(picture) as image:
            assert image.size == (pictures.WIDTH, pictures.HEIGHT)
            assert np.asarray(image.convert("L"), dtype=float).std() > 10
    alternative = re.search(r"!\[([^\]]+)\]\(docs/pictures/report\.png\)", (pictures.PICTURE.parents[2] / "README.md").read_text())  # fmt: skip
    assert alternative is not None and len(alternative[1].split()) > 10
