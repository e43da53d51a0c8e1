"""Steps of an engine on ranks beside float64: losses, metrics and gradients, one sequence at a time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import plain
import torch
from deepspeed.utils import safe_get_full_grad
from rank_jobs import G, config_for, make_policy, ready

from prefopt_dist.batching.batches import ScoredRows, step_batch
from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.batching.order import Order
from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.derived import UnpairedRows
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.monitoring import statistics
from prefopt_dist.setup import prepare_models
from prefopt_dist.training import step
from prefopt_dist.training.stop import Request


def equality(
    folder: Path,
    name: str,
    budget: int,
    loss: dict[str, object],
    *,
    of: str = "model",
    against: str = "reference",
    make_engine: Callable[[Config, prepare_models.Models], Any] = make_policy,
    exact_start: Callable[[Path], Any] = plain.build_plain,
    steps: int | None = None,
    path: ComputePath = "shared",
    shared: int = 1,
    **sections: dict[str, object],
) -> dict:
    """One epoch's steps, their gradients, losses and metrics, against float64, unsharded, one sequence at a time.

    `shared` ranks share each row.
    """
    sections["model"] = {"name_or_path": str(folder / of)} | sections.get("model", {})
    config = config_for(
        folder,
        name,
        loss=loss,
        reference={"name_or_path": str(folder / against)} if loss["name"] in ("dpo", "ipo", "kto") else {},
        # What a run may say; the budget here is smaller.
        train={"global_batch_pairs": G, "micro_batch_tokens": 512, "sequence_parallel": shared},
        **sections,
    )
    models, objective, scored, _ = ready(config, path)
    engine = make_engine(config, models)
    order = Order(scored.rows.source, scored.rows.weights, config.run.seed, G)
    taken = []
    for index in range(steps or order.steps_per_epoch):
        rows = order.step(index).rows.tolist()
        batch = step_batch(scored, rows, objective.responses, budget, path=path, group=models.group)
        packed = step.forward_backward(engine, batch, objective, None)
        sums, _ = step.reduce_metrics(packed, Request(False, False))
        means = statistics.means(objective.metrics, sums, objective.counted_by)
        grads = {n: safe_get_full_grad(p) for n, p in engine.module.lm.named_parameters() if p.requires_grad}
        taken.append((rows, len(batch), means, {n: grad.double() for n, grad in grads.items()}))
        engine.optimizer.zero_grad()
    zero3.release(engine)
    exact = partial(beside_exact, taken, scored, loss, folder, of, against, exact_start)
    return ranks.run_on_rank_zero(exact)  # once is enough: the other ranks' numbers are the same


def beside_exact(
    taken: list[tuple[list[int], int, dict[str, float], dict[str, torch.Tensor]]],
    scored: ScoredRows,
    loss: dict[str, object],
    folder: Path,
    of: str,
    against: str,
    exact_start: Callable[[Path], Any],
) -> dict:
    """What `equality` returns, of the rows, micro-batches, metrics and gradients of each step."""
    exact_policy = exact_start(folder / of)
    exact_reference = plain.build_plain(folder / against)
    found: dict[str, Any] = {"loss": [], "metrics": [], "gradient": [], "sizes": [], "micro_batches": [], "ids": []}
    for rows, micro_batches, means, grads in taken:
        exact_policy.zero_grad()
        expected = exact_step(exact_policy, exact_reference, scored, rows, loss)
        expected["loss_tensor"].backward()
        worst = 0.0
        trained = {n: p for n, p in exact_policy.named_parameters() if p.requires_grad}
        assert grads.keys() == trained.keys(), sorted(grads.keys() ^ trained.keys())[:4]
        for n, p in trained.items():
            worst = max(worst, float((grads[n] - p.grad).norm() / p.grad.norm()))
        found["gradient"].append(worst)
        found["loss"].append([means["loss"], expected["loss"]])
        found["metrics"].append([means, {k: v for k, v in expected.items() if k != "loss_tensor"}])
        found["sizes"].append(len(rows))
        found["micro_batches"].append(micro_batches)
        found["ids"].append(rows)
    return found


def exact_step(policy: Any, reference: Any, scored: ScoredRows, rows: list[int], loss: dict[str, object]) -> dict:
    data = scored.rows
    if loss["name"] == "sft":
        terms = [
            -plain.sequence_logp(policy, data.prompt(i), data.response(i, 0)) / len(data.response(i, 0)) for i in rows
        ]
        mean = torch.stack(terms).mean()
        return {"loss": mean.item(), "loss_tensor": mean}
    if loss["name"] == "kto":
        return exact_kto(policy, reference, data, rows, loss)
    live = plain_pairs(policy, data, rows)
    with torch.no_grad():
        start = plain_pairs(reference, data, rows)
    lengths = torch.tensor([[len(data.response(i, k)) for k in (0, 1)] for i in rows], dtype=torch.float64)
    terms, reward = plain.pair_loss(loss, live, start, lengths)
    mean, margin = terms.mean(), reward[:, 0] - reward[:, 1]
    nat = loss["beta"] if loss["name"] == "dpo" else loss["beta"] / lengths
    return {
        "loss": mean.item(),
        "loss_tensor": mean,
        "rewards/chosen": reward[:, 0].mean().item(),
        "rewards/rejected": reward[:, 1].mean().item(),
        "rewards/margins": margin.mean().item(),
        "rewards/accuracies": (margin > 0).double().mean().item(),
        "logps/chosen": live[:, 0].mean().item(),
        "logps/rejected": live[:, 1].mean().item(),
        "scale": (nat * live.abs()).sum(1).mean().item(),
    }


def exact_kto(policy: Any, reference: Any, data: UnpairedRows, rows: list[int], loss: dict[str, object]) -> dict:
    def logps(model: Any, k: int) -> torch.Tensor:
        return torch.stack([plain.sequence_logp(model, data.prompt(i), data.response(i, k)) for i in rows])

    live = logps(policy, 0)
    with torch.no_grad():
        start = logps(reference, 0)
        z0 = max(0.0, (logps(policy, 1) - logps(reference, 1)).mean().item())
    good = torch.from_numpy(data.labels[rows] == 1)
    mean = plain.kto_loss(live, start, good.tolist(), z0, loss).mean()
    reward = (loss["beta"] * (live - start)).detach()
    found = {"loss": mean.item(), "loss_tensor": mean, "kto/z0": z0, "kto/desirable": good.double().mean().item()}
    found["scale"] = (loss["beta"] * live.abs()).max().item()
    for response, mine in (("chosen", good), ("rejected", ~good)):
        if mine.any():
            found[f"rewards/{response}"] = reward[mine].mean().item()
            found[f"logps/{response}"] = live.detach()[mine].mean().item()
    return found


def plain_pairs(model: Any, data: TokenisedRows, rows: list[int]) -> torch.Tensor:
    pairs = [(data.prompt(i), data.response(i, 0), data.response(i, 1)) for i in rows]
    return torch.stack([torch.stack(plain.pair_log_probs(model, *pair)) for pair in pairs])
