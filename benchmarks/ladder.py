"""The optimisations between a padded step and ours, one by one, in plain torch in one process without an engine.

Every rung computes the same loss from the same stored reference log-probs, except the first, which has the reference
model in memory. Each rung adds one optimisation to the rung before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks import meter
from benchmarks.world import Task
from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.model.load import load_unsharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO

RUNGS = {
    "padded": "padded to the longest, all logits, reference in memory",
    "stored": "… the reference's log-probs stored",
    "packed": "… packed without padding, each prompt twice",
    "shared": "… each prompt once",
    "scorer": "… log-probs of the responses alone, without logits",
    "fused": "… the head's gradient formed in the forward pass",
}


def run(task: Task, folder: Path, rung: str) -> dict[str, Any]:
    """Run the task's steps on one rung; return losses, times and memory."""
    torch.manual_seed(0)
    plain = rung in ("padded", "stored")
    device, dtype = torch.device(task.device), getattr(torch, task.dtype)
    if plain:
        lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(device)
    else:
        lm = load_unsharded(inspect_folder(folder / "model", "model"), dtype=dtype).to(device)
    scorer = Scorer(lm) if rung in ("scorer", "fused") else None
    units = [Unit(i, _ids(p), (_ids(c), _ids(r))) for i, (p, c, r) in enumerate(task.drawn())]
    steps = [[units[i] for i in task.rows(k)] for k in range(task.warm_up + task.steps)]
    lm.train()

    def sums(of: Any, step: list[Unit]) -> torch.Tensor:
        if plain:
            return _padded(of, step, device)
        if rung == "packed":
            single = [[Unit(u.row, u.prompt, (u.responses[k],)) for u in step] for k in range(2)]
            return torch.stack([_with_logits(of, pack(s, 1).to(device)) for s in single], dim=1)
        batch = pack(step, 2).to(device)
        return (_with_logits(of, batch) if scorer is None else scorer.sequence_sums(batch))[batch.units]

    with torch.no_grad():
        reference = [sums(lm, step) for step in steps]
    optimizer = torch.optim.AdamW(lm.parameters(), lr=task.learning_rate, weight_decay=0.0, fused=True)
    frozen = None
    if rung == "padded":
        frozen = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(device)
    baseline = meter.start_peak()
    losses, times = [], []
    for step, stored in zip(steps, reference, strict=True):
        start = meter.Mark.now()
        if scorer is not None and rung == "fused":
            loss = scorer(pack(step, 2).to(device), DPO(task.beta), stored).loss / len(step)
        else:
            live = sums(lm, step)
            if frozen is not None:
                with torch.no_grad():
                    stored = sums(frozen, step)
            reward = task.beta * (live - stored)
            loss = -F.logsigmoid(reward[:, 0] - reward[:, 1]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), task.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(meter.Mark.now().since(start))
    return {"losses": losses, "steps": times, "first_pass": None, "baseline": baseline, "peak": meter.peak()}


def _ids(tokens: list[int]) -> Any:
    return torch.tensor(tokens, dtype=torch.int32).numpy()


def _padded(lm: Any, step: list[Unit], device: torch.device) -> torch.Tensor:
    """Return log-prob sums [U, 2] from 2U padded rows [prompt, response, padding]."""
    rows = [(u.prompt, u.responses[k]) for k in range(2) for u in step]
    longest = max(len(p) + len(r) for p, r in rows)
    ids, mask, scored = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(3))
    for i, (p, r) in enumerate(rows):
        end = len(p) + len(r)
        ids[i, : len(p)], ids[i, len(p) : end] = torch.from_numpy(p), torch.from_numpy(r)
        mask[i, :end] = 1
        scored[i, len(p) : end] = 1
    ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
    logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logps.double() * scored[:, 1:]).sum(1).view(2, -1).t()


def _with_logits(lm: Any, batch: MicroBatch) -> torch.Tensor:
    """Return log-prob sums, float64 [Q], from the logits of the whole packed row."""
    logits = lm(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=batch.segments,
        gathered=batch.gathered,
        use_cache=False,
    ).logits[0]
    logps = logits.float().log_softmax(-1)[batch.source].gather(-1, batch.target).flatten()[batch.scored]
    return torch.segment_reduce(logps.double(), "sum", lengths=batch.counts, unsafe=True)
