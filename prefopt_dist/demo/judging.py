"""A single process of the demo that trains controls and scores answers, so that the packages are imported once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prefopt_dist.commands import train
from prefopt_dist.demo import parts
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError

STOPPED = 75
"""Exit status of a job that stopped on request and can be resumed."""


def judge_control(folder: Path, seed: int, rate: float) -> bool:
    """Train a control and score its answers; return whether it was trained to the end."""
    config = parts.control_config(folder, seed, rate)
    if not (config.run_dir / "DONE").exists():
        train.run(config)
        if not (config.run_dir / "DONE").exists():
            return False
    parts.judge_answers(folder, seed, config.run_dir.name, config)
    return True


def main() -> int:
    """Score the recipe's answers, then train and score the controls; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m prefopt_dist.demo.judging")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--recipe", help="a recipe whose model is judged first")
    parser.add_argument("--controls", type=float, nargs="*", default=[], help="learning rates of controls")
    options = parser.parse_args()
    ranks.start()
    try:
        if options.recipe is not None:
            config = parts.config_of(options.recipe, options.folder, options.seed)
            parts.judge_answers(options.folder, options.seed, options.recipe, config)
        for rate in options.controls:
            if not judge_control(options.folder, options.seed, rate):
                return STOPPED
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    ranks.end()
    return 0


if __name__ == "__main__":
    ranks.exit_now(main())
