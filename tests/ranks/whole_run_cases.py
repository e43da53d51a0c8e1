"""Cases of rank_cases.py on whole runs: their metrics, a resume to the same bits, an early stop."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import DPO, Crash, config_for, the_end

from prefopt_dist.checkpoint import save
from prefopt_dist.commands import train
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError

WHOLE_RUNS: dict[str, dict[str, object]] = {
    "kto": {"name": "kto", "beta": 0.5, "split_pairs": True},
    "kto-zero": {"name": "kto", "beta": 0.5, "split_pairs": True, "reference_point": "zero"},
    "mix": {"name": "mix", "of": {"dpo": {"weight": 1.0}, "ipo": {"weight": 0.05}, "robust": {"weight": 0.5}}},
}


def whole_runs(folder: Path) -> dict:
    """With evaluation; KTO once more, crashed in its fourth step behind a checkpoint: it must end as the other."""
    found = whole_run(folder, "kto") | whole_run(folder, "kto", crash=True)
    found["run-weighted-whole"] = weighted_run(folder)
    return found


def more_whole_runs(folder: Path) -> dict:
    return whole_run(folder, "kto-zero") | whole_run(folder, "mix")


def whole_run(folder: Path, name: str, *, crash: bool = False) -> dict:
    config = config_for(
        folder,
        f"{name}-{'crashed' if crash else 'whole'}",
        loss=WHOLE_RUNS[name],
        data={"eval": str(folder / "pairs.jsonl")},
        train={"max_steps": 4},
        eval={"every_steps": 2},
        checkpoint={"every_steps": 3},
    )
    if crash:
        with Crash(step=4), pytest.raises(ConnectionAbortedError):
            train.run(config)
    train.run(config)
    return {config.run_dir.name: ranks.run_on_rank_zero(partial(the_end, config.run_dir))}


def weighted_run(folder: Path) -> dict[str, Any]:
    """A run whose rows have weights, some of them 0, and margins of a half."""
    file = folder / "weighted.jsonl"

    def write() -> None:
        rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"w": k % 3, "a": 2, "b": 1.5}) + "\n" for k, row in enumerate(rows)))

    ranks.run_on_rank_zero(write)
    data = {"train": str(file), "eval": str(file), "weight": "w", "margin": "a - b"}
    loss = DPO | {"ld_alpha": 0.5}  # its reference has beginnings of responses, which the step-0 check compares too
    config = config_for(folder, "weighted-whole", loss=loss, data=data, train={"max_steps": 3})
    train.run(config)
    return ranks.run_on_rank_zero(partial(the_end, config.run_dir))


def early_stop(folder: Path) -> dict:
    """By a metric that never changes: the first evaluation is the best; killed before the export, started again."""
    metric = "eval/lengths/chosen"
    config = config_for(
        folder,
        "early",
        loss={"name": "dpo"},
        data={"eval": str(folder / "pairs.jsonl")},
        train={"epochs": 2, "early_stop": {"metric": metric, "evaluations": 3}},
        eval={"every_steps": 1},
        checkpoint={"every_steps": 1, "keep_best": metric},
    )
    train.run(config)
    ranks.run_on_rank_zero(lambda: (config.run_dir / "DONE").unlink())
    train.run(config)
    unknown = replace(config, run=replace(config.run, dir=str(folder / "unknown")))
    unknown = replace(unknown, checkpoint=replace(config.checkpoint, keep_best="eval/los"))
    try:
        train.run(unknown)
        said = "accepted"
    except UserError as e:
        said = str(e)
    lines = ranks.run_on_rank_zero(lambda: (config.run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        "rows": [[row["kind"], row["step"]] for row in map(json.loads, lines)],
        "checkpoints": ranks.run_on_rank_zero(lambda: [p.name for p in save.committed(config.run_dir / "checkpoints")]),
        "done": ranks.run_on_rank_zero(lambda: (config.run_dir / "DONE").read_text()),
        "best": ranks.run_on_rank_zero(lambda: json.loads((config.run_dir / "run.json").read_text())["best"]),
        "said": said,
    }
