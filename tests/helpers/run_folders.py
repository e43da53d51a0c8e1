"""Run folders as `train` leaves them, made without training: for what reads them."""

import json
import math
import random
from pathlib import Path
from typing import Any

import worlds

from prefopt_dist.config import Config, load_config, to_yaml
from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.metrics_file import MetricsFile, strict_json
from prefopt_dist.monitoring.statistics import BIN_EDGES
from prefopt_dist.monitoring.verdict import verdict


def small_config(tmp_path: Path, *overrides: str) -> Config:
    """Return the configuration of a run in tmp_path/run, which names two sources of data and a named evaluation set."""
    text = {
        "run": {"dir": str(tmp_path / "run"), "seed": 3},
        "model": {"name_or_path": "some/model"},
        "data": {"train": [{"path": "a.jsonl", "weight": 0.5}, "b.jsonl"], "eval": {"x": "c.jsonl"}},
        "optim": {"learning_rate": 5e-7},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(text))
    return load_config(file, overrides)


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


def answers_row(
    word: str = "better", *, rewards: bool = True, step: int = 120, start: bool = False, **changes: Any
) -> dict[str, Any]:
    """A row of answers, as its kind of model has it; start: the row of step 0."""
    base = {"answers/prompts": 64}
    of_start = {"length": 31.4, "ended": 0.98, "repeated_4grams": 0.01, "distinct": 1.0} | (
        {"reward": 0.731, "reward_low": 0.69, "reward_high": 0.77} if rewards else {}
    )
    keys = {"kind": "answers", "step": 0 if start else step, "epoch": 1.0, "pairs_seen": 32 * step}
    if start:
        return keys | base | {f"answers/{name}": value for name, value in of_start.items()}
    apart, low, high = {"better": (0.081, 0.046, 0.13), "worse": (-0.2, -0.25, -0.15)}.get(word, (0.01, -0.03, 0.05))
    nats, reference = (0.57, 1.29) if word == "collapsed" else (0.19, 0.31)
    row = base | {
        "answers/length": 35.2,
        "answers/ended": 0.97,
        "answers/repeated_4grams": 0.02,
        "answers/distinct": 0.98,
        "answers/nats": nats,
        "answers/reference_nats": reference,
        "answers/chosen/reference_nats": 0.09,
        "answers/start/reference_nats": 0.12,
        "answers/kl": 35 * (reference - nats),
        "answers/kl_low": 30 * (reference - nats),
        "answers/kl_high": 40 * (reference - nats),
        "answers/kl_per_token": reference - nats,
    }
    row |= {f"answers/start/{name}": value for name, value in of_start.items()}
    if rewards:
        row |= {
            "answers/compared": 64,
            "answers/reward": 0.731 + apart,
            "answers/reward_low": 0.691 + apart,
            "answers/reward_high": 0.771 + apart,
            "answers/reward_difference": apart,
            "answers/reward_difference_low": low,
            "answers/reward_difference_high": high,
            "answers/win_rate": 0.5 + apart,
            "answers/win_rate_low": 0.5 + low,
            "answers/win_rate_high": 0.5 + high,
        }
    return keys | row | changes


def add_answers(folder: Path, word: str, *, rewards: bool = True, on_its_way: tuple[int, ...] = ()) -> None:
    """As `train` leaves them in a run folder that is done; not judged: without rewards."""
    file = MetricsFile(folder / "metrics.jsonl")
    rows = file.rows()
    last = rows[-1]["step"]
    rewards = rewards and word != "not judged"
    asked = [answers_row(start=True, rewards=rewards)]
    asked += [answers_row("no difference", step=step, rewards=rewards) for step in on_its_way]
    asked += [answers_row(word, step=last, rewards=rewards)]
    kept = [strict_json(row) for row in sorted([*rows, *asked], key=lambda row: row["step"])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    row = asked[-1]
    found = verdict(row, Health(), str(folder / "final"))
    block: dict[str, Any] = {"prompts": 64, "left_out": 2, "verdict": found.word, "verdict_text": found.text}
    if rewards:
        reward = row["answers/reward"]
        block |= {"reward": {"mean": reward, "low": reward - 0.04, "high": reward + 0.04}}
        block |= {"start": {"reward": {"mean": 0.731, "low": 0.69, "high": 0.77}}}
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"answers": block}))
    after = (
        "so the so the so the " * 40 if word == "collapsed" else "Dear Anna,\n\nthe train is late. See you at <ten>."
    )
    said: dict[str, Any] = {
        "prompt": "Write to my aunt & say that the train is late.",
        "before": "yo, late",
        "after": after,
    }
    if rewards:
        said |= {"reward_before": 0.25, "reward_after": 1.0}
    (folder / "answers.jsonl").write_text((json.dumps(said) + "\n") * 10)


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
