"""The page of `report` in a real browser: nothing loaded, nothing complained of, charts drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest

from lora_advisor.advisor.outcome import Progress
from lora_advisor.advisor.page import page
from lora_advisor.advisor.page_source import Run, Source, read_source
from lora_advisor.advisor.samples import Sample
from lora_advisor.probes.plan import read_plan

pytestmark = pytest.mark.skipif(
    chromium.program() is None, reason="Chromium is not installed (apt-get install chromium)"
)

H100 = Path(__file__).parent / "recordings" / "regret" / "plan-qwen2.5-1.5b-1024-peft.json"
HOSTILE = """<img src=x onerror="window.hurt=1"><script>window.hurt=1</script>'"&"""

#: Of every chart that is shown: marks with a size within the chart, and the colour of the first.
CHARTS = """[...document.querySelectorAll("svg")].filter(s => s.getClientRects().length).map(s => {
  const box = s.getBoundingClientRect();
  const marks = [...s.querySelectorAll("rect, circle, path, polygon")].filter(m => {
    const b = m.getBoundingClientRect();
    return b.width + b.height > 1 && b.left >= box.left - 2 && b.right <= box.right + 2;
  });
  const small = [...s.querySelectorAll("text")].map(t => t.getBoundingClientRect())
    .filter(b => b.left < box.left - 1 || b.right > box.right + 1).length;
  return {label: s.getAttribute("aria-label"), marks: marks.length, width: box.width, cut: small,
          texts: s.querySelectorAll("text").length};
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.opened(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan with names of others, and of a training that has not ended."""
    plan = read_plan(H100)
    plan = dataclasses.replace(
        plan, machine=dataclasses.replace(plan.machine, name=HOSTILE), excluded=((HOSTILE, "x"),)
    )
    points = tuple(
        Progress(step=step, steps=40, loss=3.0 / step, tokens_per_s=90.0 + step,
                 padded_tokens_per_s=100.0 + step, peak_bytes=2**30, seconds_left=10.0)
        for step in range(1, 30)
    )  # fmt: skip
    run = Run(
        name=HOSTILE, config=plan.chosen.config, device="cuda", stack=plan.stack, points=points,
        events=((3, "recovery", HOSTILE),), eval_loss_before=3.5, result=None,
        samples=(Sample(prompt=HOSTILE, reference=HOSTILE, base=HOSTILE * 30, tuned="x" * 600),),
    )  # fmt: skip
    source = Source(name=HOSTILE, plan=plan, run=run, trail=read_source(H100).trail)
    path = tmp_path_factory.mktemp("page") / 'a "quoted" page.html'
    path.write_text(page(source, None, no_map=HOSTILE), "utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1000, 360])
def test_the_page_loads_alone_and_its_charts_have_content(
    browser: chromium.Page, file: Path, width: int, dark: bool
) -> None:
    browser.look(width=width, dark=dark)
    browser.open(file)

    charts: list[dict[str, Any]] = browser.run(CHARTS)

    assert browser.requests == [file.resolve().as_uri()]
    assert browser.complaints == []
    assert browser.run("window.hurt") is None
    assert browser.run("document.documentElement.scrollWidth") == width
    # Loss, tokens/s, memory; the process, the stages, speed against memory.
    assert len(charts) == 6
    for chart in charts:
        assert chart["marks"] >= 5 and chart["texts"] >= 5, chart
        assert chart["cut"] == 0 and 300 < chart["width"] <= width, chart
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    ink = browser.run("getComputedStyle(document.querySelector('svg text')).fill")
    assert (brightness(background) < 60) == dark
    assert (brightness(ink) > 180) == dark


def brightness(colour: str) -> float:
    """Return the mean of "rgb(1, 2, 3)"."""
    parts = [float(part) for part in colour.strip("rgba()").split(",")[:3]]
    return sum(parts) / 3


def test_a_mark_tells_its_figures_under_the_pointer(browser: chromium.Page, file: Path) -> None:
    browser.look(width=1000)
    browser.open(file)
    assert browser.run("document.getElementById('tip').hidden") is True
    # A page tells of its scrolling with the next frame, and scrolling hides what is told.
    place = browser.run(
        "(async () => { const m = document.querySelector('.wide polygon.star');"
        " const scrolled = new Promise(done => addEventListener('scroll', done, {once: true}));"
        " m.scrollIntoView({block: 'center'}); await scrolled;"
        " const b = m.getBoundingClientRect();"
        " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )

    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])

    assert browser.run("document.getElementById('tip').hidden") is False
    told = browser.run("document.getElementById('tip').textContent")
    assert told.startswith("the plan: lora, bf16, 12 x 1024 x 2") and "36,503 tokens/s" in told


def test_the_page_can_be_printed(browser: chromium.Page, file: Path, tmp_path: Path) -> None:
    browser.look(width=1000, dark=True)
    browser.open(file)

    browser.pdf(tmp_path / "page.pdf")

    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "page.pdf").stat().st_size > 30_000
    browser.ask("Emulation.setEmulatedMedia", media="print",
                features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.ask("Emulation.setEmulatedMedia", media="")
    assert brightness(background) > 240
