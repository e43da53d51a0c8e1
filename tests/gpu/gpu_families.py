"""Part 2: every family's scorer on the device beside the CPU, and no host synchronisation in its hot path."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from gpu_results import Place, Results, distance
from models_for_tests import MODELS, make, pairs, references

from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.batching.packing import pack
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO

FEW = ("llama-tied", "gemma2", "olmoe")
"""Those of a typing check"""
SUMS, GRADIENTS = 1e-5, 1e-4
"""‖Δ‖/‖exact‖ in float32, where only the order of sums differs"""
TIMES, MORE = 3.0, 0.03
"""In bfloat16 the device may be this many times as far from float32 as the CPU is, and this much more."""


@contextmanager
def no_syncs(place: Place) -> Iterator[None]:
    """Let torch raise where the host waits for the GPU; on the CPU do nothing."""
    if not place.cuda:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def scored(
    name: str, batch: MicroBatch, reference: torch.Tensor, dtype: torch.dtype, place: Place
) -> tuple[torch.Tensor, torch.Tensor, str | None]:
    """Sums of the sequences, all gradients in one vector (float64, on the CPU), and the first synchronisation."""
    scorer = Scorer(make(name, dtype).to(place.device))
    batch, reference = batch.to(place.device), reference.to(place.device)
    sync = None
    for guarded in (False, True):  # the first pass makes handles and tables, for which the host may wait
        scorer.zero_grad()
        try:
            with no_syncs(place) if guarded else warnings.catch_warnings():
                terms = scorer(batch, DPO(0.3), reference)
                terms.loss.backward()
        except RuntimeError as error:
            if not guarded:
                raise
            sync = str(error)[:300]
            continue
        sums = terms.sums.detach().double().cpu()
        grads = torch.cat([p.grad.double().cpu().flatten() for p in scorer.parameters()])
    return sums, grads, sync


def run(place: Place, results: Results, names: Iterable[str] | None = None) -> None:
    """Compare the models `names`, by default all, or few in a typing check."""
    torch.backends.cuda.matmul.allow_tf32 = False
    host = Place(torch.device("cpu"), place.tiny, place.scratch)
    units = pairs()
    batch, reference = pack(units, 2), references(units)
    for name in names or (FEW if place.tiny else MODELS):
        experts = "num_experts_per_tok" in make(name).config.to_dict()
        exact = scored(name, batch, reference, torch.float32, host)
        for dtype in (torch.float32, torch.bfloat16):
            with results.case(f"{name}, {str(dtype).removeprefix('torch.')}") as found:
                sums, grads, sync = scored(name, batch, reference, dtype, place)
                found |= {"sums": distance(sums, exact[0]), "gradients": distance(grads, exact[1]), "sync": sync}
                if dtype == torch.float32:
                    right = found["sums"] <= SUMS and found["gradients"] <= GRADIENTS
                else:
                    there = scored(name, batch, reference, dtype, host)
                    found |= {"cpu_sums": distance(there[0], exact[0]), "cpu_gradients": distance(there[1], exact[1])}
                    right = all(found[n] <= TIMES * found[f"cpu_{n}"] + MORE for n in ("sums", "gradients"))
                # The last bit of a router's score may choose another expert on a GPU: then the numbers say nothing.
                right = right or (place.cuda and experts and bool(grads.isfinite().all() and sums.isfinite().all()))
                # torch has a kernel for the products of experts in bfloat16 alone; in float32 it reads their sizes.
                found["ok"] = right and (sync is None or (experts and dtype == torch.float32))
