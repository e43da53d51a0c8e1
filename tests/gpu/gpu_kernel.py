"""Part 1: the attention of a packed row beside plain float32 math.

On a GPU it is the flash kernel on the arguments that training gives it; on the CPU the calls by segment.
Legend: T tokens of the row, H query heads, J key-value heads, d size of a head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gpu_results import Place, Results, distance, synchronize, within
from models_for_tests import pairs

from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model import attention

HEAD_SIZES = (128, 64, 256, 96, 80, 32)
HEADS = 8
GROUPS = (4, 1, 8)
"""Query heads of a key-value head"""
WINDOWS = (None, 64, 5)
BACKWARDS = 20
TOLERANCE = 1e-2
"""‖Δ‖/‖exact‖ of outputs and gradients; bfloat16 rounds by up to 0.4 %, here of scores, weights and results."""
TOLERANCE_OF_SEGMENT = 3e-2
"""The same of the worst segment's outputs, which may be one token's"""


def long_pairs() -> list[Unit]:
    """Twelve pairs of one prompt, pairs of prompts of their own, and one-token queries behind long prefixes."""
    draw = np.random.RandomState(2)

    def tokens(n: int) -> np.ndarray:
        return draw.randint(3, 30_000, size=n).astype(np.int32)

    shared, other = tokens(301), tokens(777)
    units = [Unit(i, shared, (tokens(40 + 9 * i), tokens(150 - 11 * i))) for i in range(12)]
    units += [Unit(20 + i, tokens(64 * i + 1), (tokens(129), tokens(128 + i))) for i in range(4)]
    return [*units, *(Unit(30 + i, other, (tokens(2), tokens(2))) for i in range(3))]


def rows(place: Place) -> dict[str, MicroBatch]:
    found = {"every kind of sharing": pack(pairs(), 2)}
    if not place.tiny:
        found["long"] = pack(long_pairs(), 2)
    return {name: batch.to(place.device) for name, batch in found.items()}


def heads(batch: MicroBatch, place: Place, d: int, group: int, seed: int = 0) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient: bfloat16 [1, heads, T, d], drawn on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    sizes = (HEADS, HEADS // group, HEADS // group, HEADS)
    drawn = [torch.randn(1, n, batch.tokens, d, generator=draw) for n in sizes]
    return [x.to(place.device, torch.bfloat16) for x in drawn]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: MicroBatch, window: int | None) -> torch.Tensor:
    """softmax(q kᵀ/√d) v by segment in the dtype of the arguments, [1, T, H, d]; a query sees its prefix and itself."""
    parts = []
    for s in batch.segments:
        at = torch.cat([torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end)]).to(q.device)
        queries = q[0, :, s.start : s.end]
        keys, values = (x[0, :, at].repeat_interleave(len(q[0]) // len(x[0]), dim=0) for x in (k, v))
        own, all_ = s.end - s.start, len(at)
        apart = torch.arange(own, device=q.device)[:, None] + (all_ - own) - torch.arange(all_, device=q.device)
        seen = (apart >= 0) & (apart < (window or all_))
        scores = (queries @ keys.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        parts.append(scores.softmax(-1) @ values)
    return torch.cat(parts, dim=1).transpose(0, 1)[None]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: MicroBatch, window: int | None) -> torch.Tensor:
    out, _ = attention.shared_prefix_attention(
        torch.nn.Identity(),
        q,
        k,
        v,
        None,
        scaling=q.shape[-1] ** -0.5,
        segments=batch.segments,
        gathered=batch.gathered,
        sliding_window=window,
    )
    return out


def with_gradients(
    compute: Any, given: list[torch.Tensor], batch: MicroBatch, window: int | None
) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [x.detach().clone().requires_grad_() for x in given[:3]]
    out = compute(*leaves, batch, window)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3].transpose(1, 2).to(out.dtype))]


def cases(place: Place) -> Iterator[tuple[str, MicroBatch, int, int, int | None]]:
    sizes = HEAD_SIZES[1:2] if place.tiny else HEAD_SIZES
    for name, batch in rows(place).items():
        for d in sizes:
            for group in GROUPS:
                for window in WINDOWS:
                    yield f"d {d}, H/J {group}, window {window}, {name}", batch, d, group, window


def run(place: Place, results: Results) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, batch, d, group, window in cases(place):
        with results.case(name) as found:
            given = heads(batch, place, d, group)
            if place.cuda:
                assert attention.varlen_supported(given[0].shape[-1], given[0].dtype, given[0].device), (
                    "the flash kernel is not taken"
                )
            got = with_gradients(ours, given, batch, window)
            exact = with_gradients(plain, [x.float() for x in given], batch, window)
            errors = dict(zip(("out", "dq", "dk", "dv"), map(distance, got, exact), strict=True))
            parts = [distance(got[0][:, s.start : s.end], exact[0][:, s.start : s.end]) for s in batch.segments]
            worst = max(parts) if all(map(math.isfinite, parts)) else math.inf
            found |= errors | {"worst_segment": worst, "tokens": batch.tokens}
            found["ok"] = within(errors.values(), TOLERANCE) and within([worst], TOLERANCE_OF_SEGMENT)
    for name, batch in rows(place).items():
        repeat(place, results, name, batch)
    speed(place, results)


def repeat(place: Place, results: Results, name: str, batch: MicroBatch) -> None:
    """Twenty backward passes: equal under deterministic algorithms; how many differ without is only reported."""
    given, repeats = heads(batch, place, 128, 4), 3 if place.tiny else BACKWARDS
    for deterministic in (True, False):
        with results.case(f"{repeats} backwards, deterministic {deterministic}, {name}") as found:
            torch.use_deterministic_algorithms(deterministic)
            try:
                first, *others = (with_gradients(ours, given, batch, None) for _ in range(repeats))
                different = sum(any(not torch.equal(a, b) for a, b in zip(first, x, strict=True)) for x in others)
            finally:
                torch.use_deterministic_algorithms(False)
            found |= {"different": different, "ok": different == 0 if deterministic else None}


def speed(place: Place, results: Results) -> None:
    """The time of one layer's attention of an 8B model on 8,192 tokens of pairs like UltraFeedback's."""
    draw, units = np.random.RandomState(4), []
    tokens = 256 if place.tiny else 8192
    while sum(len(u.prompt) + sum(map(len, u.responses)) for u in units) < tokens:
        lengths = np.clip(draw.lognormal((4.9, 5.5, 5.5), (0.9, 0.6, 0.6)), 12, tokens // 4).astype(int)
        prompt, *responses = (draw.randint(3, 30_000, size=n).astype(np.int32) for n in lengths)
        units.append(Unit(len(units), prompt, tuple(responses)))
    batch = pack(units, 2).to(place.device)
    with results.case("time of an 8B layer's attention") as found:
        H, J, d = (4, 1, 32) if place.tiny else (32, 8, 128)
        q, k, v = (
            torch.randn(1, n, batch.tokens, d, device=place.device).bfloat16().requires_grad_() for n in (H, J, J)
        )
        gradient = torch.randn(1, batch.tokens, H, d, device=place.device).bfloat16()
        repeats = 2 if place.tiny else 20
        for backward in (False, True):
            for timed in (False, True):
                synchronize(place)
                began = time.perf_counter()
                for _ in range(repeats if timed else 3):
                    out = ours(q, k, v, batch, None)
                    if backward:
                        torch.autograd.grad(out, (q, k, v), gradient)
                synchronize(place)
            name = "forward_backward_ms" if backward else "forward_ms"
            found[name] = 1000 * (time.perf_counter() - began) / repeats
        found |= {"tokens": batch.tokens, "ok": None}
