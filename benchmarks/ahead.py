"""Rounds in turn beside rounds that are answered one ahead, in the demo's world: python -m benchmarks.ahead.

For each seed the recipe demo_rounds.yaml runs twice, with rounds.ahead 0 and 1: three rounds of 533 prompts, a process
for the training, and for the answers ahead a second one; both sample with transformers. The last model of each then
answers 400 prompts that are in none of the demo's files, and the true reward of its answers is given with its 95 %
interval, with the wall time of each job and of its parts. No GPU. The demo's SFT model must be there (`make demo`).
What is done is not done again, so a time is that of the start that ended a job.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.frontier import RECIPE, RESULTS, TRUE, write_fresh
from prefopt_dist.files import read_json, write_json
from prefopt_dist.monitoring.statistics import interval_text


def prefopt(stage: str, *overrides: str) -> None:
    """Run a stage of the recipe in a process of its own."""
    subprocess.run([sys.executable, "-m", "prefopt_dist", stage, RECIPE, *overrides], check=True)


def measure(folder: Path, world: Path, model: str, seed: int, ahead: int, overrides: list[str]) -> dict[str, Any]:
    """Run the rounds and judge their last model by the true reward."""
    run, fresh = folder / f"seed-{seed}-ahead-{ahead}", folder / "fresh.jsonl"
    result = run / "measured.json"
    if result.exists():
        found: dict[str, Any] = read_json(result)
        return found
    common = [
        f"model.name_or_path={model}",
        f"run.seed={seed}",
        f"run.cache={folder / 'cache' / run.name}",
        f"generate.prompts={world / 'few.jsonl'}",
        f"data.train={world / 'few.jsonl'}",
        "tracking.wandb.mode=disabled",
    ]
    began = time.monotonic()
    of_rounds = [f"evaluate.prompts={world / 'held_out.jsonl'}", f"rounds.ahead={ahead}", *overrides]
    prefopt("rounds", *common, f"run.dir={run}", *of_rounds)
    seconds = time.monotonic() - began
    last = read_json(run / "rounds.json")
    final = run / f"round-{len(last['rounds'])}" / "final"
    prefopt(
        "evaluate",
        *common,
        f"run.dir={run / 'measured'}",
        f"evaluate.model={final}",
        f"evaluate.prompts={fresh}",
        TRUE,
    )
    answers = read_json(run / "measured" / "evaluation.json")["answers"]
    found = {
        "seed": seed,
        "ahead": ahead,
        "wall_seconds": seconds,
        "parts": last["seconds"],
        "start": answers["against"]["reward"],
        "reward": answers["policy"]["reward"],
        "kl": answers["kl"],
        "by_judge": [one["policy"]["reward"] for one in last["rounds"]],
    }
    write_json(result, found)
    return found


def main() -> int:
    """Run all seeds both ways and write what was measured."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/demo/sft/final", help="the demo's SFT model")
    parser.add_argument("--world", type=Path, default=Path("runs/demo/world"), help="the demo's prompts")
    parser.add_argument("--folder", type=Path, default=Path("runs/ahead"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="of the rounds, such as rounds.count=9")
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    write_fresh(options.folder / "fresh.jsonl")
    found = []
    for seed in range(options.seeds):
        for ahead in (0, 1):
            one = measure(options.folder, options.world, options.model, seed, ahead, options.overrides)
            found.append(one)
            print(
                f"seed {seed}, ahead {ahead}: true reward {interval_text(one['start'])} → "
                f"{interval_text(one['reward'])}, KL {interval_text(one['kl'])}, {one['wall_seconds']:.0f} s",
                flush=True,
            )
            if options.save:
                write_json(RESULTS / f"{options.save}.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
