"""The page about a run, checked for its form."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from prefopt_dist.cli import main


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


def slow_until(run: Path, step: int) -> None:
    """One rank is slow before this step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    slow = {"perf/slowest_rank": 1, "perf/other_ranks_seconds": 1.0, "perf/slowest_rank_load": 1.0}
    for row in lines:
        if row["kind"] == "train":
            row |= slow | {"perf/slowest_rank_seconds": 3.0 if row["step"] < step else 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
