"""The report in a real browser: readable on a phone and in the dark, quiet, and deaf to what a model makes up."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Page, browser_page
from tests.pipeline.report_run import HOSTILE, STAGES, make_run, write_run_page, write_stage_page

STEPS = 30
CONTRAST = """
(selectors => {
  const rgb = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = rgb(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  let worst = {ratio: 99};
  for (const [selector, property] of selectors) for (const node of document.querySelectorAll(selector)) {
    const [a, b] = [light(rgb(getComputedStyle(node)[property])), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst.ratio) worst = {ratio, what: `${selector} ${property}: ${node.outerHTML.slice(0, 120)}`};
  }
  return worst;
})
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "made_up", STEPS)
    for file in folder.glob("*/lineage.json"):
        write_stage_page(file.parent)
    write_run_page(folder)
    return folder


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser_page() as page:
        yield page


def pages(run: Path) -> list[Path]:
    return [run / "report.html", *(run / name / "report.html" for name in STAGES if name != "eval")]


@pytest.mark.parametrize("width", [375, 1280])
def test_no_page_scrolls_sideways_loads_anything_or_complains(run: Path, page: Page, width: int) -> None:
    for file in pages(run):
        page.open(file, width=width)
        assert page.run("innerWidth") == width
        assert page.run("document.documentElement.scrollWidth") <= width, file
        assert page.run("performance.getEntriesByType('resource').length") == 0
        assert page.run("document.querySelectorAll('script, img, iframe, object').length") == 1, "the page's own script"
        assert not page.errors, file


def test_hostile_text_is_shown_as_text(run: Path, page: Page) -> None:
    shown = HOSTILE.replace("\u202e", "\\u202e")
    for file in (run / "report.html", *(run / name / "report.html" for name in ("reason", "pairs", "gate_reason"))):
        page.open(file, width=375)
        assert shown in page.run("document.body.textContent"), file
        assert page.run("document.title") != "owned"


def test_curves_are_drawn_and_say_their_values(run: Path, page: Page) -> None:
    page.open(run / "reason" / "report.html", width=375)
    assert page.run("[...document.querySelectorAll('figcaption')].map(c => c.textContent).join()").count(",") > 12
    counts = page.run("[...document.querySelectorAll('.plot polyline')].map(p => p.points.length)")
    assert len(counts) > 15 and set(counts) == {STEPS}
    boxes = page.run("[...document.querySelectorAll('.plot polyline')].map(p => p.getBBox().width)")
    assert min(boxes) > 200
    bar = page.run("[...document.querySelectorAll('.bar i')].map(part => part.getBoundingClientRect().width)")
    assert min(bar) > 5 and sum(bar) > 300
    page.run("document.querySelector('.plot').scrollIntoView({block: 'center'})")
    box = page.run("(b => [b.x, b.y, b.width, b.height])(document.querySelector('.plot').getBoundingClientRect())")
    place = {"x": box[0] + box[2] * 0.97, "y": box[1] + box[3] / 2}
    page.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    text = page.run("document.querySelector('output').textContent")
    name, value = text.partition(": ")[2].split(", ")[0].split(" ")
    assert text.startswith("at step 30: ") and name == "total"
    last = page.run("document.querySelector('.keys b').textContent")
    assert float(value) == pytest.approx(float(last), abs=0.01)
    assert not page.errors


@pytest.mark.parametrize("dark", [False, True])
def test_everything_stands_out_from_what_is_behind_it(run: Path, page: Page, dark: bool) -> None:
    text = [
        (selector, "color") for selector in ("h1", "h2", "p", "a", ".pill", ".keys span", ".text", ".note", "td", "th")
    ]
    text += [(".tile span", "color"), ("svg text", "fill")]
    for file in pages(run):
        page.open(file, width=1280, dark=dark)
        assert page.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
        assert page.run(f"{CONTRAST}({[list(pair) for pair in text]})")["ratio"] >= 4.5
        shapes = page.run(f"{CONTRAST}([['.curve', 'stroke'], ['.stem', 'stroke'], ['.dot', 'fill']])")
        assert shapes["ratio"] >= 3, shapes


def test_a_page_looks_again_only_while_its_stage_runs(run: Path, page: Page) -> None:
    for name, looks in (("prefer", True), ("reason", False), ("", True)):
        page.open(run / name / "report.html", width=375)
        assert page.run("!!document.querySelector('meta[http-equiv=refresh]')") is looks


def test_stages_are_links_to_their_pages(run: Path, page: Page) -> None:
    page.open(run / "report.html", width=375)
    links = page.run("[...document.querySelectorAll('.stages a')].map(a => a.href)")
    assert [Path(link).parent.name for link in links] == [name for name in STAGES if name != "eval"]
    assert all(Path(link.removeprefix("file://")).is_file() for link in links)
