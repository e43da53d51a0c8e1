"""The page about a run: what it says, that it needs nothing else, and how it looks in a real browser."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import worlds
from run_folders import add_answers, write_run_folder

from prefopt_dist.cli import main
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.report.page import banner
from prefopt_dist.report.record import read_run
from prefopt_dist.report.sweep import sweep_table


class _Tags(HTMLParser):
    """Opened and closed tags, and whatever would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "img", "path", "use"):
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag


def page(run: Path, *overrides: str) -> str:
    """The report of a run by the command line, well-formed and whole in itself."""
    file = run.parent / "page.html"
    assert main(["report", str(run / "config.yaml"), f"report.file={file}", *overrides]) == 0
    text = file.read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.fetched == []
    assert not re.search(r"@import|url\((?!#)|<script", text)
    return text


def test_the_page_of_a_run(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "ill", ill=True, sets=("helpful", "harmless"))
    (run / "inspection.json").write_text(json.dumps({"data.train": {"findings": {"<b>equal</b>": 7}}}))
    (run / "answers.jsonl").write_text(json.dumps({"prompt": "Say <hi>", "before": "no", "after": "hi & ho"}) + "\n")
    text = page(run)
    plain = text.replace("\u200b", "")
    assert "Not well: one warning stands. The chosen responses are losing their probability." in text
    for said in (
        "chosen-falls",
        "Raise loss.beta",
        "train.dropped.empty response",
        "&lt;b&gt;equal&lt;/b&gt;",
        "2026-01-01T12:00:00",
        "checkpoint of step",
        "2.13.0",
        "micro_batch_tokens",
        "evaluation harmless",
        "Say &lt;hi&gt;",
        "hi &amp; ho",
    ):
        assert said in plain, said
    titles = re.findall(r"<title>([^<]*)</title>", text)
    assert titles == [
        "ill",
        "Loss",
        "Accuracy of the rewards",
        "Margin of the rewards",
        "Rewards",
        "Margins of the pairs",
        "Log-probs per token",
        "Log-probs against the reference's",
        "Gradient norm before clipping",
        "Throughput",
        "Where the time goes",
        "Memory of a rank",
        "Time line",
    ]
    assert not re.search(r"#0[123]0[123]0\d", text), "a stand-in of a colour is left"
    assert "mathdefault" not in text, "a label is a formula, as it is written"


def test_a_run_without_findings_and_one_that_has_not_begun(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "well", steps=60)
    assert "No rule has a warning. Whether the answers are better was not judged." in page(run)
    (run / "DONE").unlink()
    MetricsFile(run / "metrics.jsonl").cut_back(20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # while the run writes
    text = page(run)
    assert "No rule has a warning. Whether the answers are better is seen at the end." in text
    assert "step 20 of 60" in text
    (run / "metrics.jsonl").unlink()
    assert "Nothing to judge yet" in page(run)


def test_a_warning_that_is_over_is_no_verdict(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "slow", steps=60)
    slow_until(run, 30)
    record = read_run(run, "run.dir")
    assert [f.id for f in record.found if f.level == "warning"] == ["slow-rank"]
    assert banner(record)["text"].startswith("It has recovered")


def slow_until(run: Path, step: int) -> None:
    """One rank is slow before this step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    slow = {"perf/slowest_rank": 1, "perf/other_ranks_seconds": 1.0, "perf/slowest_rank_load": 1.0}
    for row in lines:
        if row["kind"] == "train":
            row |= slow | {"perf/slowest_rank_seconds": 3.0 if row["step"] < step else 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [
        write_run_folder(tmp_path / f"beta{beta}", steps=60, ill=beta == 0.1, beta=beta, seed=i)
        for i, beta in enumerate((0.1, 0.3, 0.5))
    ]
    text = page(runs[0], f"report.compare=[{', '.join(map(str, runs))}]")
    assert "They differ in: loss.beta." in text
    assert "chosen-falls" in text
    assert len(re.findall(r"<title>", text)) == 9
    assert "its answers are" not in text
    for run, word in zip(runs, ("better", "collapsed"), strict=False):
        add_answers(run, word)
    text = page(runs[0], f"report.compare=[{', '.join(map(str, runs))}]")
    assert '<td>better</td><td class="n">0.812</td><td class="n">4.2</td>' in text
    assert '<td>collapsed</td><td class="n">0.741</td><td class="n">25.2</td>' in text
    assert '<td>–</td><td class="n">–</td><td class="n">–</td>' in text
    assert all(f"<strong>beta{beta}</strong>" in text for beta in (0.1, 0.3, 0.5))


def test_names_are_no_markup(tmp_path: Path) -> None:
    """Of runs and of sets: HTML, formulas, and what matplotlib leaves out of a legend."""
    sets = ("<script>alert(1)</script>", "$\\frac{$", "_hidden")
    runs = [write_run_folder(tmp_path / name, steps=20, sets=sets) for name in ("_a<b>&$x^$", "$\\sum$")]
    config = (runs[0] / "config.yaml").read_text()
    (runs[0] / "config.yaml").write_text(config + "# </pre><script>alert(2)</script>\n")
    for text in (page(runs[0]), page(runs[0], f"report.compare={json.dumps(list(map(str, runs)))}")):
        plain = text.replace("\u200b", "")
        assert "_a&lt;b&gt;&amp;$x^$" in plain
    text = page(runs[0]).replace("\u200b", "")
    assert "evaluation &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "evaluation $\\frac{$" in text
    assert "evaluation _hidden" in text


def test_a_run_that_goes_on_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its older checkpoint is pruned between the look at the folder and that at its files."""
    run = write_run_folder(tmp_path / "going-on", steps=20)
    (run / "DONE").unlink()
    gone = run / "checkpoints" / "step-00000010" / "manifest.json"
    stat = Path.stat

    def vanishing(self: Path, **options: bool) -> os.stat_result:
        if self == gone:
            raise FileNotFoundError(self)
        return stat(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", vanishing)
        assert [c.step for c in read_run(run, "run.dir").checkpoints] == [20]
    (row,) = sweep_table([read_run(run, "run.dir")])
    assert row["state"] == "not finished"


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worlds.write_run(tmp_path / "run.yaml", tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "none")
    assert main(["report", str(tmp_path / "run.yaml")]) == 2
    assert "run.dir: " in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run.yaml"), f"report.compare=[{tmp_path}]"]) == 2
    assert "report.compare[0]: " in capsys.readouterr().err


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
Y_NAMES = {"loss", "share of pairs", "reward", "nats a token", "norm", "tokens a second", "seconds a row", "GiB"}
Y_NAMES |= {"share of the pairs", "event", "nats an answer", "tokens"}
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
