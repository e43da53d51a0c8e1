"""A single process of the demo: trains controls and judges answers, so that what it imports is imported once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prefopt_dist.commands import train
from prefopt_dist.demo import parts
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError

STOPPED = 75
"""The status of a job that was asked to stop and can go on."""


def judge_control(folder: Path, seed: int, rate: float) -> bool:
    """Trains a control and judges its answers; whether it got to the end."""
    config = parts.control_config(folder, seed, rate)
    if not (config.run_dir / "DONE").exists():
        train.run(config)
        if not (config.run_dir / "DONE").exists():
            return False
    parts.judge_answers(folder, seed, config.run_dir.name, config)
    return True


def main() -> int:
    """Does what it is given, in order."""
    parser = argparse.ArgumentParser(prog="python -m prefopt_dist.demo.judging")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--recipe", help="a recipe whose model is judged first")
    parser.add_argument("--controls", type=float, nargs="*", default=[], help="learning rates of controls")
    asked = parser.parse_args()
    ranks.start()
    try:
        if asked.recipe is not None:
            config = parts.config_of(asked.recipe, asked.folder, asked.seed)
            parts.judge_answers(asked.folder, asked.seed, asked.recipe, config)
        for rate in asked.controls:
            if not judge_control(asked.folder, asked.seed, rate):
                return STOPPED
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    ranks.end()
    return 0


if __name__ == "__main__":
    ranks.exit_now(main())
