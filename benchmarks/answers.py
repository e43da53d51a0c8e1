"""Cost of 64 answers of the start and of the trained model in a run: python -m benchmarks.answers.

The run is the demo's (after `make demo`: its SFT model, its pairs), in one process, with a cache of its own, so that
nothing is reused. `perf/answers_seconds` of its rows of answers is the time of sampling, rewards and the reference's
scoring at the end. It is compared with the estimate of `plan` for this machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt_dist.commands import plan, train
from prefopt_dist.config import Plan
from prefopt_dist.demo import parts
from prefopt_dist.distributed import ranks
from prefopt_dist.files import read_json, write_json
from prefopt_dist.monitoring.metrics_file import MetricsFile

RESULTS = Path(__file__).parent / "results"
NUMBER = 64


def measure(demo: Path, folder: Path) -> dict[str, Any]:
    """Return seconds of the run and of its answers, and the shares, measured and planned."""
    shutil.rmtree(folder, ignore_errors=True)
    own = (f"run.dir={folder / 'run'}", f"run.cache={folder / 'cache'}", f"answers.number={NUMBER}")
    config = parts.config_of("demo", demo, 0, *own, "tracking.wandb.mode=disabled")
    began = time.perf_counter()
    train.run(config)
    seconds = time.perf_counter() - began
    rows = MetricsFile(config.run_dir / "metrics.jsonl").rows()
    answers = [row for row in rows if row["kind"] == "answers"]
    spent = {("start", "end")[i]: row["perf/answers_seconds"] for i, row in enumerate(answers)}
    file = folder / "plan.json"
    plan.run(replace(config, plan=Plan(gpu="cpu", gpus_per_node=1, file=str(file))))
    planned = read_json(file)["seconds"]
    return {
        "prompts": NUMBER,
        "tokens": [row["answers/length"] for row in answers],
        "run_seconds": seconds,
        "answers_seconds": spent,
        "share": sum(spent.values()) / seconds,
        "planned_share": planned["answers"] / (planned["answers"] + planned["total"]),
    }


def text(found: dict[str, Any]) -> str:
    """Return the result as text."""
    spent = found["answers_seconds"]
    return (
        f"a run of {found['run_seconds']:.0f} s, of which {spent['start']:.1f} s for the start's {found['prompts']} "
        f"answers and {spent['end']:.1f} s for the trained model's and their scoring: {found['share']:.1%} of the run; "
        f"plan says at most {found['planned_share']:.1%} of first pass, training, evaluation and answers, which leaves "
        "out loading and saving"
    )


def main() -> int:
    """Measure once, print the result and save it."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--demo",
        type=Path,
        default=Path(parts.DEFAULT_FOLDER),
        help=f"a demo's folder (default {parts.DEFAULT_FOLDER})",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/answers"))
    options = parser.parse_args()
    if not (options.demo / "pairs" / "train.jsonl").exists():
        print(f"error: {options.demo} has no pairs; run `make demo` first", file=sys.stderr)
        return 2
    ranks.start()
    found = measure(options.demo, options.folder)
    ranks.end()
    print(text(found))
    print(json.dumps(found))
    write_json(RESULTS / "answers.json", found)
    return 0


if __name__ == "__main__":
    ranks.exit_now(main())
