"""Cases of rank_cases.py on ranked rows: 2 to 5 responses to a prompt as one unit."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import plain
import pytest
import rank_jobs
import torch
import worlds
from deepspeed.utils import safe_get_full_grad

from prefopt_dist.batching.batches import step_batch
from prefopt_dist.commands import train
from prefopt_dist.config.build import _build_loss
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.monitoring import statistics
from prefopt_dist.objectives import factory
from prefopt_dist.training import step
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.stop import Request

SCORES = (5.0, 3.5, 3.5, 1.0, 1.0)
BETA = 0.2


def write_rows(folder: Path) -> Path:
    """Rows made of pairs, whose prompts stand more than once; each has the responses of some pairs after it too."""
    pairs, file = folder / "short.jsonl", folder / "ranked.jsonl"

    def write() -> None:
        worlds.write_pairs(pairs, rank_jobs.PAIRS, longest=20)
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        lines = []
        for i, row in enumerate(rows):
            others = [rows[(i + j) % len(rows)] for j in (1, 2, 3)]
            texts = [row["chosen_response"], row["rejected_response"], *(o["rejected_response"] for o in others)]
            texts = list(dict.fromkeys(texts))[: 2 + i % 4]
            lines.append({"prompt": row["prompt"], "responses": texts, "scores": SCORES[: len(texts)]})
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    ranks.run_on_rank_zero(write)
    return file


def _config(folder: Path, name: str, **sections: Any) -> Any:
    rows = str(write_rows(folder))
    sections["train"] = {"micro_batch_tokens": 512, **sections.get("train", {})}
    return rank_jobs.config_for(folder, name, data={"train": rows, "eval": rows}, **sections)


def ranked_values(folder: Path) -> dict:
    """A step and an evaluation of both losses, under many micro-batches and one, beside loops in float64."""
    loss: dict[str, object] = {"name": "plackett_luce", "beta": BETA}
    config = _config(folder, "ranked", loss=loss, reference={"name_or_path": str(folder / "reference")})
    models, _, scored, _ = rank_jobs.ready(config)
    engine = rank_jobs.make_policy(config, models)
    data, every = scored.rows, list(range(scored.rows.n))
    rows, taken = every[: rank_jobs.G], []
    for name in ("plackett_luce", "all_pairs"):
        objective = factory.make_objective(_build_loss({"name": name, "beta": BETA}, "loss"), torch.float32)
        for budget in (150, 100_000):
            batch = step_batch(scored, rows, objective.responses_of(data.responses), budget)
            packed = step.forward_backward(engine, batch, objective, None)
            sums, _ = step.reduce_metrics(packed, Request(False, False))
            means = statistics.means(objective.metrics, sums, objective.counted_by)
            grads = {n: safe_get_full_grad(p).double() for n, p in engine.module.lm.named_parameters()}
            engine.optimizer.zero_grad()
            evaluated = evaluate(engine, objective, {"": scored}, budget)
            taken.append((name, budget, len(batch), means, grads, evaluated))
    zero3.release(engine)

    def beside_exact() -> dict:
        policy, reference = (plain.build_plain(folder / name) for name in ("model", "reference"))
        ratios, best = [], []
        for i in every:
            responses = [data.response(i, k) for k in range(data.responses_held(i))]
            live = [plain.sequence_logp(policy, data.prompt(i), r) for r in responses]
            with torch.no_grad():
                start = [plain.sequence_logp(reference, data.prompt(i), r) for r in responses]
            ratios.append([BETA * (a - b) for a, b in zip(live, start, strict=True)])
            best.append(live[0].item())
        given = [[SCORES.index(s) for s in SCORES[: len(row)]] for row in ratios]  # equal scores have the first's index
        found: dict[str, Any] = {"held": sorted(map(len, ratios)), "responses": data.responses}
        for name, budget, micro_batches, means, grads, evaluated in taken:
            losses = torch.stack([plain.ranked_loss(name, r, g) for r, g in zip(ratios, given, strict=True)])
            policy.zero_grad()
            losses[: len(rows)].mean().backward(retain_graph=True)
            exact = {n: p.grad for n, p in policy.named_parameters()}
            found[f"{name}, {budget}"] = {
                "micro_batches": micro_batches,
                "loss": [means["loss"], losses[: len(rows)].mean().item()],
                "logps": [means["logps/chosen"], sum(best[: len(rows)]) / len(rows)],
                "evaluated": [evaluated["eval/loss"], losses.mean().item()],
                "rows": evaluated["eval/rows"],
                "gradient": max(float((grads[n] - exact[n]).norm() / exact[n].norm()) for n in exact),
            }
        return found

    return ranks.run_on_rank_zero(beside_exact)


def ranked_run(folder: Path) -> dict:
    """A whole run whose reference moves, and once more, crashed behind a checkpoint: it must end as the other."""
    found: dict[str, Any] = {}
    for name in ("whole", "crashed"):
        config = _config(
            folder,
            f"ranked-{name}",
            loss={"name": "all_pairs", "beta": 0.5},
            reference={"update_every_steps": 2},
            train={"max_steps": 4},
            eval={"every_steps": 2},
            checkpoint={"every_steps": 3},
        )
        if name == "crashed":
            with rank_jobs.Crash(step=4), pytest.raises(ConnectionAbortedError):
                train.run(config)
        train.run(config)
        found[name] = ranks.run_on_rank_zero(partial(rank_jobs.the_end, config.run_dir))
    return found
