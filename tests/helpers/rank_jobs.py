"""Make what cases on ranks share: a run's configuration and parts, a crash in a step, what a run leaves."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import worlds

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.config import Config, load_config
from prefopt_dist.distributed import ranks
from prefopt_dist.objectives import factory
from prefopt_dist.setup import prepare_data, prepare_models, prepare_policy, prepare_reference
from prefopt_dist.training import step

PAIRS, G = 37, 11
DPO = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1}
KTO = {"name": "kto", "beta": 0.05, "desirable_weight": 1.0, "undesirable_weight": 1.3, "split_pairs": True}


def config_for(folder: Path, name: str, **sections: dict[str, object]) -> Config:
    file = folder / f"{name}.yaml"
    ranks.run_on_rank_zero(
        lambda: worlds.write_run(file, folder / "model", folder / "pairs.jsonl", folder / f"run-{name}", **sections)
    )
    return load_config(file)


def ready(config: Config, path: ComputePath = "shared") -> tuple[prepare_models.Models, Any, ScoredRows, str | None]:
    """Models, objective and scored training rows, by the job's own way."""
    models = replace(prepare_models.load_models(config), path=path)
    objective = factory.make_objective(config.loss, models.dtype)
    rows = prepare_data.load_train(config, models, objective)
    reference = prepare_reference.reference_weights(config, models, objective)
    (scored,), _ = prepare_reference.score_reference(config, models, [rows], reference, lambda: False)
    return models, objective, scored, reference and reference.key


def make_policy(config: Config, models: prepare_models.Models) -> Any:
    """The engine, by the job's own way."""
    return prepare_policy.load_policy(config, models, 1.0)[0]


class Crash:
    """Every rank fails as a step begins."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __enter__(self) -> None:
        self._gradient = step.forward_backward
        step.forward_backward = self.gradient

    def __exit__(self, *_: object) -> None:
        step.forward_backward = self._gradient

    def gradient(self, engine: Any, *args: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise ConnectionAbortedError
        return self._gradient(engine, *args)


def the_end(run_dir: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = (run_dir / "final" / "model.safetensors").read_bytes()
    return {
        "weights": hashlib.sha256(weights).hexdigest(),
        "rows": [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows],
        "starts": [s["step"] for s in json.loads((run_dir / "run.json").read_text())["starts"]],
    }


def prepare(folder: Path) -> None:
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_model(folder / "reference", seed=2, scale=2.0)
    worlds.write_family(folder / "gemma2", folder / "model", "gemma2", sliding_window=5)
    worlds.write_family(folder / "phi3", folder / "model", "phi3", sliding_window=9)
    worlds.write_pairs(folder / "pairs.jsonl", PAIRS)
