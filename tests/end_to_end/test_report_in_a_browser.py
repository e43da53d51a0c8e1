"""How the page about a run looks in a real browser."""

from pathlib import Path

import browser
import pytest
from run_folders import add_answers, write_run_folder
from run_page import page

OVERFLOWING = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, pre, svg, details:not([open])')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))
"""


BEYOND_ITS_CHART = """
[...document.querySelectorAll('svg')].flatMap(svg => { const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
        return b.left < box.left - 1 || b.right > box.right + 1 || b.bottom > box.bottom + 1 || b.top < box.top - 1})
    .map(t => svg.querySelector('title').textContent + ': ' + t.textContent)})
"""


AXES = """
[...document.querySelectorAll('svg')].map(svg => [svg.querySelector('title').textContent,
    [...svg.querySelectorAll('text')].map(t => t.textContent.trim())])
"""


COLOURS = """
(() => { const of = e => getComputedStyle(e); const text = document.querySelector('svg text');
    return [of(document.body).backgroundColor, of(document.body).color, of(text).fill]; })()
"""


Y_NAMES = {"loss", "share of pairs", "reward", "nats per token", "norm", "tokens per second", "seconds per row", "GiB"}


Y_NAMES |= {"share of the pairs", "event", "nats per answer", "tokens"}


X_NAMES = {"step", "reward margin (logarithmic beyond ±0.1)"}


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser_nothing_overflows_and_every_axis_has_its_name(tmp_path: Path) -> None:
    """A run and a sweep, on a phone and a desk, light and dark."""
    runs = [
        write_run_folder(tmp_path / f"a-run-with-a-long-name-{i}", ill=i == 0, sets=("helpful", "harmless"), seed=i)
        for i in range(3)
    ]
    for run, word in zip(runs, ("collapsed", "better", "not judged"), strict=True):
        add_answers(run, word, on_its_way=(30, 60))
    pages = {"run": tmp_path / "run.html", "sweep": tmp_path / "sweep.html"}
    pages["run"].write_text(page(runs[0]))
    pages["sweep"].write_text(page(runs[0], f"report.compare=[{', '.join(map(str, runs))}]"))
    look = browser.Browser(tmp_path / "profile")
    try:
        seen: dict[str, set[tuple[str, ...]]] = {"light": set(), "dark": set()}
        for name, file in pages.items():
            for width in (390, 1280):
                for scheme in ("light", "dark"):
                    look.open(file, width=width, scheme=scheme)
                    place = f"{name}, {width}, {scheme}"
                    assert look.ask("document.documentElement.scrollWidth") <= width, place
                    assert look.ask(OVERFLOWING) == [], place
                    assert look.ask(BEYOND_ITS_CHART) == [], place
                    charts = look.ask(AXES)
                    assert len(charts) == {"run": 15, "sweep": 8}[name]
                    for title, texts in charts:
                        assert X_NAMES & set(texts), f"{place}: the x axis of {title} has no name"
                        assert Y_NAMES & set(texts), f"{place}: the y axis of {title} has no name"
                    seen[scheme].add(tuple(look.ask(COLOURS)))
        assert len(seen["light"]) == len(seen["dark"]) == 1
        assert seen["light"].isdisjoint(seen["dark"])
        for background, ink, chart in seen["light"] | seen["dark"]:
            assert ink == chart != background
        assert all(address.startswith("file:") for address in look.asked)
    finally:
        look.close()
