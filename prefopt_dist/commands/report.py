"""`report`: write a page with curves and diagnosis of a run, or of several, from their folders alone."""

from __future__ import annotations

from pathlib import Path

from prefopt_dist.config import Config
from prefopt_dist.files import write_atomic
from prefopt_dist.monitoring.console import say
from prefopt_dist.report.page import run_page, sweep_page
from prefopt_dist.report.record import read_run


def run(config: Config) -> None:
    """Write the page in one process, without a process group; the run may go on meanwhile."""
    if config.report.compare:
        records = [read_run(Path(path), f"report.compare[{i}]") for i, path in enumerate(config.report.compare)]
        page, default = sweep_page(records), config.run_dir.parent / "report.html"
    else:
        page, default = run_page(read_run(config.run_dir, "run.dir")), config.run_dir / "report.html"
    file = default if config.report.file is None else Path(config.report.file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, page)
    say(f"report: {file}")
