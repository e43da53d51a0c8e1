"""Run folders as `train` leaves them, made without training: for what reads them."""

import json
import math
import random
from pathlib import Path
from typing import Any

import worlds

from prefopt_dist.config import load_config, to_yaml
from prefopt_dist.tracking.diagnosis import BIN_EDGES
from prefopt_dist.tracking.metrics_file import MetricsFile


def write_run_folder(
    folder: Path, *, steps: int = 120, sets: tuple[str, ...] = ("",), ill: bool = False, seed: int = 0, **loss: Any
) -> Path:
    """A run that was restarted once, with evaluations and checkpoints; an ill one loses its chosen responses."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    file = folder.parent / f"{folder.name}.yaml"
    model, data = folder.parent / "model", folder.parent / "pairs.jsonl"
    worlds.write_run(file, model, data, folder, loss={"name": "dpo", "beta": 0.1} | loss)
    (folder / "config.yaml").write_text(to_yaml(load_config(file)))
    counts = {"rows": 4000, "used": 3990, "dropped": {"empty response": 10}, "cut": {"prompt": 3}, "digest": "ab" * 16}
    facts = {
        "run_id": "0a1b2c3d",
        "wandb_id": "0a1b2c3d",
        "identity": {},
        "starts": [
            {"world_size": 2, "time": "2026-01-01T10:00:00+00:00", "step": 0},
            {"world_size": 4, "time": "2026-01-01T12:00:00+00:00", "step": steps // 2},
        ],
        "data": {"train": counts, "eval": None},
        "reference": {"key": "c" * 32, "sequences_scored": 8000, "sequences_reused": 0},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "training": {"total_steps": steps, "log_every_steps": 1, "start_loss": math.log(2)},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    metrics = MetricsFile(folder / "metrics.jsonl")
    for step in range(steps + 1):
        part = step / steps
        if step:
            metrics.append("train", step, part, 32 * step, _row("train/", part, 32, draw, ill) | _machine(part, draw))
        if step % max(1, steps // 4) == 0:
            found: dict[str, Any] = {}
            for name in sets:
                found |= _row(f"eval/{name}/".replace("//", "/"), part, 400, draw, ill)
            metrics.append("eval", step, part, 32 * step, found)
    metrics.close()
    for step in (steps // 2, steps):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    (folder / "DONE").write_text("done\n")
    return folder


def _row(prefix: str, part: float, pairs: int, draw: random.Random, ill: bool) -> dict[str, Any]:
    margins = [draw.gauss(2 * part, 1.5 * part + 1e-3) for _ in range(pairs)]
    counts = [0] * (len(BIN_EDGES) + 1)
    for m in margins:
        counts[sum(m >= edge for edge in BIN_EDGES)] += 1
    mean, ordered = sum(margins) / pairs, sorted(margins)
    fall = -1.5 * part if ill else -0.02 * part
    values = {
        "loss": sum(math.log1p(math.exp(-m)) for m in margins) / pairs,
        "rewards/chosen": 10 * fall,
        "rewards/rejected": 10 * fall - mean,
        "rewards/margins": mean,
        "rewards/accuracies": sum(m > 0 for m in margins) / pairs,
        "rewards/margins_p10": ordered[pairs // 10],
        "rewards/margins_p90": ordered[-pairs // 10],
        "rewards/margins_histogram": counts,
        "rewards/margins_by_length": 0.1,
        "logps/chosen_per_token": -1.1 + fall,
        "logps/rejected_per_token": -1.2 + 2 * fall,
        "logratio/chosen_per_token": fall,
        "logratio/rejected_per_token": 2 * fall,
        "lengths/chosen_longer": 0.5,
        "lengths/chosen_shorter": 0.5,
    }
    return {prefix + name: value for name, value in values.items()}


def _machine(part: float, draw: random.Random) -> dict[str, Any]:
    return {
        "train/grad_norm": 2 * math.exp(-part) + draw.random(),
        "perf/tokens_per_second": 9000 + 500 * draw.random(),
        "perf/step_seconds": 2.4,
        "perf/data_seconds": 0.02,
        "perf/forward_seconds": 0.6 + 0.05 * draw.random(),
        "perf/backward_seconds": 1.3 + 0.05 * draw.random(),
        "perf/forward_backward_seconds": 2 + 0.1 * draw.random(),
        "perf/update_seconds": 0.3,
        "perf/memory_gib": 31.0,
        "perf/peak_memory_gib": 40.5,
    }
