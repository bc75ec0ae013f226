"""Draws the picture of the README: the report of the demo, as a browser shows it.

    make demo
    python -m tests.pictures runs/demo

It needs chromium.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from deploy.report.run_files import read_run
from deploy.report.run_page import write_page
from tests.unit.deploy.browser import Browser

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "report.png"
WIDTH, HEIGHT = 1100, 1560
LARGEST_BYTES = 200_000


def draw(run_dir: str | Path, picture: Path) -> None:
    """Write the picture of a run's report, with as few colours as look the same, because a page has few."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        page = write_page(read_run(run_dir), folder / "report.html")
        # The page names the run by its place on this machine.
        text = page.read_text().replace(str(Path(run_dir).absolute()), f"runs/{Path(run_dir).name}")
        page.write_text(text)
        with Browser(folder) as browser:
            browser.open(page, width=WIDTH, height=HEIGHT)
            browser.screenshot(folder / "shot.png")
        picture.parent.mkdir(exist_ok=True)
        with Image.open(folder / "shot.png") as shot:
            shot.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    draw(sys.argv[1], PICTURE)
    print(f"{PICTURE}: {PICTURE.stat().st_size >> 10} KiB")
