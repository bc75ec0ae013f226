"""The pages of runs can be used by everybody: axe-core finds nothing, and the keyboard reaches everything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.report.compare import comparison, read_runs, write_comparison
from deploy.report.run_files import read_run
from deploy.report.run_page import write_page
from tests.unit.deploy.browser import CHROMIUM, Browser, axe_source
from tests.unit.deploy.run_folders import run_folder

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install -y chromium")
AXE = axe_source()
FORMS = {
    "light": {"width": 1200},
    "dark": {"width": 1200, "dark": True},
    "phone": {"width": 390},
    "dark phone": {"width": 390, "dark": True},
}
PAGES = ("run", "comparison", "damaged")
_FINDINGS = """axe.run(document, {resultTypes: ["violations"]}).then(found => JSON.stringify(
    found.violations.map(rule => [rule.id, rule.help, rule.nodes.map(node => node.html.slice(0, 200)).slice(0, 3)])))"""
_FOCUSABLE = "[...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex]')]"
_FOCUSED = f"""(() => {{
    const element = document.activeElement, style = getComputedStyle(element), box = element.getBoundingClientRect();
    return {{
        number: {_FOCUSABLE}.indexOf(element), outline: style.outlineStyle, width: parseFloat(style.outlineWidth),
        colour: style.outlineColor, ground: getComputedStyle(document.body).backgroundColor,
        shown: box.bottom > 0 && box.top < innerHeight && box.width > 0 && box.height > 0,
    }};
}})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    one, two, damaged = (run_folder(folder / name) for name in ("one", "two", "damaged"))
    two.settings.write_text('{"learner.num_updates": 60, "data.path": "other.jsonl"}')
    for path in (damaged.summary, damaged.evaluation("after"), damaged.config):
        path.unlink()
    damaged.failure.write_text('{"message": "rollout-0: it must not break; repair it"}')
    runs = read_runs([one.path, two.path, damaged.path])
    return {
        "run": write_page(read_run(one.path)),
        "comparison": write_comparison(runs, comparison(runs)),
        "damaged": write_page(read_run(damaged.path)),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def findings(browser: Browser) -> list[object]:
    """The rules that the open page breaks, each with the first elements that do so."""
    browser.value(f"{AXE}; typeof axe.run")
    return json.loads(browser.value(_FINDINGS))


@pytest.mark.skipif(AXE is None, reason="needs axe-core: deploy/setup.sh dev")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_nothing(page: str, form: str, pages: dict[str, Path], browser: Browser):
    browser.open(pages[page], **FORMS[form])
    assert findings(browser) == []


@pytest.mark.skipif(AXE is None, reason="needs axe-core: deploy/setup.sh dev")
def test_axe_would_find_what_is_wrong(pages: dict[str, Path], browser: Browser, tmp_path: Path):
    """Contrast, headings, table headers, landmarks, roles."""
    wrong = (
        '<p style="color: #999; background: #fff">faint</p><h6>deep</h6><img src="data:,">'
        '<div role="region" tabindex="0" aria-labelledby="nowhere"></div><div role="frobnicator">x</div>'
        '<table><tr><th scope="wrong"></th><td>1</td></tr></table>'
    )
    text = (
        pages["run"].read_text().replace('<html lang="en">', "<html>").replace("</main>", f"{wrong}</main>")
    )
    (tmp_path / "page.html").write_text(text)
    browser.open(tmp_path / "page.html", width=1200)
    rules = {finding[0] for finding in findings(browser) if isinstance(finding, list)}
    assert {
        "color-contrast",
        "heading-order",
        "html-has-lang",
        "image-alt",
        "aria-roles",
        "scope-attr-valid",
    } <= rules


@pytest.mark.parametrize("form", FORMS)
def test_the_keyboard_reaches_everything_and_shows_where_it_is(
    form: str, pages: dict[str, Path], browser: Browser
):
    browser.open(pages["comparison"], **FORMS[form])
    count = browser.value(f"{_FOCUSABLE}.length")
    assert count >= 5
    reached: list[int] = []
    for _ in range(count):
        browser.press_tab()
        focused = browser.value(_FOCUSED)
        reached.append(focused["number"])
        assert focused["shown"], focused
        assert focused["outline"] == "solid" and focused["width"] >= 2, focused
        assert focused["colour"] != focused["ground"]
    assert reached == list(range(count))  # in the order of the page, and no element holds the focus


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_cut_off_on_a_narrow_screen(page: str, pages: dict[str, Path], browser: Browser):
    """Only boxes of their own scroll sideways, and the keyboard reaches each of them."""
    browser.open(pages[page], width=320)
    assert browser.value("document.documentElement.scrollWidth") <= 320
    unreachable = browser.value(
        "[...document.querySelectorAll('main *')].filter(each => each.scrollWidth > each.clientWidth + 1"
        " && ['auto', 'scroll', 'hidden'].includes(getComputedStyle(each).overflowX) && each.tabIndex < 0"
        " && !(each instanceof SVGElement)).map(each => each.outerHTML.slice(0, 100))"
    )
    assert unreachable == []
