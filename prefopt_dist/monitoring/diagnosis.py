"""What tells how a run does, beside the objective's own metrics: made of what a step computes anyway.

Everything is a sum over the units, so ranks, micro-batches and steps add theirs up, in the step's one all-reduce.

Legend: U units of a micro-batch, R responses of a unit, D sums, B bins of margins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.data import TokenisedRows
from prefopt_dist.objectives import Objective, Sequences, Terms

_POSITIVE = tuple(10 ** (i / 6) for i in range(-12, 13))
BIN_EDGES = (*(-edge for edge in reversed(_POSITIVE)), 0.0, *_POSITIVE)
"""[B − 1] of the bins of reward margins, six a decade from 0.01 to 100 on both sides of 0; the lower edge belongs."""
SATURATED = 0.01
"""A pair is saturated where the loss's slope by its chosen log-prob is less than this part of that at margin 0."""
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}

_PAIR_SUMS = (
    *("longer", "longer_won", "shorter", "shorter_won", "per_token_won", "saturated"),
    *("margin", "margin²", "length", "length²", "margin·length"),
)


class Diagnosis:
    """Running float64 sums on the device; nothing here reads them on the host or talks to another rank."""

    def __init__(self, objective: Objective, rows: TokenisedRows, device: torch.device) -> None:
        """rows: the data set that the units come from; of several sources each is told apart."""
        self._pairs = objective.responses == 2
        self._reference = objective.needs_reference
        self._columns = {name: i for i, name in enumerate(objective.metrics)}
        self._source = rows.source
        self._sources = source_labels(rows.source_names) if self._pairs and len(rows.source_names) > 1 else ()
        names = ["units", "reference"]
        for response in ("chosen", "rejected"):
            names += [f"{what}/{response}" for what in ("n", "tokens", "logp", "logratio")]
        if self._pairs:
            names += _PAIR_SUMS
            names += ["reference_won", "reference_per_token_won"] if self._reference else []
            names += [f"bin{i}" for i in range(len(BIN_EDGES) + 1)]
            names += [f"{what}:{label}" for label in self._sources for what in ("of", "won", "margin")]
        self.names = tuple(names)
        """[D]"""
        self._edges = torch.tensor(BIN_EDGES, dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, objective: Objective, terms: Terms, micro_batch: MicroBatch, reference: torch.Tensor | None) -> None:
        """The units of a micro-batch that the objective made the terms of; reference float64 [U, R]."""
        units = Sequences(
            sums=terms.sums,
            counts=micro_batch.counts[micro_batch.units],
            reference=reference,
            desirable=micro_batch.desirable,
        )
        n = torch.ones_like(terms.sums[:, 0]).sum()
        found = [n, n if self._reference else torch.zeros_like(n)]
        for response in (0, 1):
            found += self._of_response(units, response)
        if self._pairs:
            found += self._of_pairs(objective, units, terms)
            if self._sources:
                found += self._by_source(terms, micro_batch)
        self._sums += torch.stack([f.double() for f in found])

    def take(self) -> torch.Tensor:
        """float64 [D], a copy that the caller sums over the ranks; here it starts from 0 again."""
        taken = self._sums.clone()
        self._sums.zero_()
        return taken

    def metrics(self, packed: Sequence[float]) -> dict[str, Any]:
        """The metrics of [D] global sums, read on the host; what has no units is left out."""
        return _metrics(dict(zip(self.names, packed, strict=True)), self._sources)

    def _of_response(self, units: Sequences, response: int) -> list[torch.Tensor]:
        """Its number, tokens, log-prob and log-ratio; of rated rows the good ones are chosen, the others rejected."""
        if self._pairs:
            mine, column = torch.ones_like(units.sums[:, 0]), response
        else:
            assert units.desirable is not None
            mine, column = (units.desirable if response == 0 else ~units.desirable).double(), 0
        logp = units.sums[:, column]
        logratio = torch.zeros_like(logp) if units.reference is None else logp - units.reference[:, column]
        # `where`, not a product: a row that is not mine must not count however wild it is.
        zero = torch.zeros_like(logp)
        values = (mine, units.counts[:, column].double(), logp, logratio)
        return [torch.where(mine > 0, value, zero).sum() for value in values]

    def _of_pairs(self, objective: Objective, units: Sequences, terms: Terms) -> list[torch.Tensor]:
        margin = terms.per_unit[:, self._columns["rewards/margins"]]
        won = terms.per_unit[:, self._columns["rewards/accuracies"]] > 0
        counts = units.counts.double()
        length = counts[:, 0] - counts[:, 1]
        longer, shorter = length > 0, length < 0
        mean = units.sums / counts
        found = [longer, longer & won, shorter, shorter & won, mean[:, 0] > mean[:, 1], saturated(objective, units)]
        found += [margin, margin.square(), length, length.square(), margin * length]
        if units.reference is not None:
            mean = units.reference / counts
            found += [units.reference[:, 0] > units.reference[:, 1], mean[:, 0] > mean[:, 1]]
        at_least = (margin[:, None] >= self._edges).sum(0)  # [B − 1] margins at or above each edge
        above = torch.cat([at_least.new_full((1,), len(margin)), at_least])
        below = torch.cat([at_least, at_least.new_zeros(1)])
        return [f.sum() for f in found] + list((above - below).unbind())

    def _by_source(self, terms: Terms, micro_batch: MicroBatch) -> list[torch.Tensor]:
        won, margin = (terms.per_unit[:, self._columns[f"rewards/{name}"]] for name in ("accuracies", "margins"))
        source = torch.from_numpy(self._source[list(micro_batch.rows)].astype("int64"))
        source = source.to(won.device, non_blocking=True)
        found = []
        for i in range(len(self._sources)):
            mine = source == i
            found += [mine.sum(), (won * mine).sum(), (margin * mine).sum()]
        return found


def saturated(objective: Objective, units: Sequences) -> torch.Tensor:
    """bool [U]: pairs that have no gradient left to speak of, whatever the loss.

    The slope ∂L/∂ log π(chosen) is compared with that of the same pair at margin 0: where the policy is the reference,
    or, for a loss without one, where both responses have the chosen one's mean log-prob of a token.
    """
    level = units.reference
    if level is None:
        level = units.sums[:, :1] / units.counts[:, :1] * units.counts
    return _slope(objective, units, units.sums) < SATURATED * _slope(objective, units, level)


def _slope(objective: Objective, units: Sequences, sums: torch.Tensor) -> torch.Tensor:
    """float64 [U]: |∂L/∂ log π(chosen)| at these log-probs."""
    with torch.enable_grad():
        leaf = sums.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(replace(units, sums=leaf)).loss, leaf)
    return gradient[:, 0].abs()


def source_labels(names: Sequence[str]) -> tuple[str, ...]:
    """A source's last part where that tells the sources apart, else its whole path; no slash, which parts metrics."""
    short = [Path(name).name for name in names]
    clear = len(set(short)) == len(short)
    return tuple(s if clear else str(n).strip("/").replace("/", ":") for s, n in zip(short, names, strict=True))


def quantile(counts: Sequence[float], q: float) -> float:
    """The q-quantile of margins by their bins, linear within a bin; at the ends the outermost edge."""
    aim, below = q * sum(counts), 0.0
    for i, count in enumerate(counts):
        if count and below + count >= aim:
            if i == 0:
                return BIN_EDGES[0]
            if i == len(BIN_EDGES):
                return BIN_EDGES[-1]
            low, high = BIN_EDGES[i - 1], BIN_EDGES[i]
            return low + (high - low) * (aim - below) / count
        below += count
    return math.nan


def _metrics(sums: Mapping[str, float], sources: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def put(name: str, value: float, count: float) -> None:
        if count > 0:
            found[name] = value / count

    for response in ("chosen", "rejected"):
        tokens = sums[f"tokens/{response}"]
        put(f"logps/{response}_per_token", sums[f"logp/{response}"], tokens)
        if sums["reference"] > 0:
            put(f"logratio/{response}_per_token", sums[f"logratio/{response}"], tokens)
        put(f"lengths/{response}", tokens, sums[f"n/{response}"])
    if "margin" not in sums:
        return found
    n = sums["units"]
    put("logps/accuracies_per_token", sums["per_token_won"], n)
    if "reference_won" in sums:
        put("reference/accuracies", sums["reference_won"], n)
        put("reference/accuracies_per_token", sums["reference_per_token_won"], n)
    for which in ("longer", "shorter"):
        put(f"lengths/chosen_{which}", sums[which], n)
        put(f"rewards/accuracies_chosen_{which}", sums[f"{which}_won"], sums[which])
    put("saturated", sums["saturated"], n)
    found |= _correlation(sums)
    counts = [sums[f"bin{i}"] for i in range(len(BIN_EDGES) + 1)]
    if n > 0:
        found |= {f"rewards/margins_{name}": quantile(counts, q) for name, q in QUANTILES.items()}
        found["rewards/margins_histogram"] = [round(c) for c in counts]
    for label in sources:
        put(f"rewards/accuracies_of/{label}", sums[f"won:{label}"], sums[f"of:{label}"])
        put(f"rewards/margins_of/{label}", sums[f"margin:{label}"], sums[f"of:{label}"])
        found[f"pairs_of/{label}"] = round(sums[f"of:{label}"])
    return found


def _correlation(sums: Mapping[str, float]) -> dict[str, float]:
    """Pearson's, of the margin and by how many tokens the chosen response is the longer one."""
    n = sums["units"]
    if n < 2:
        return {}
    mean_margin, mean_length = sums["margin"] / n, sums["length"] / n
    margin = sums["margin²"] / n - mean_margin**2
    length = sums["length²"] / n - mean_length**2
    # A spread that is rounding has no correlation: all margins are equal before the first update.
    if margin <= 1e-9 * (mean_margin**2 + 1e-3) or length <= 0:
        return {}
    together = sums["margin·length"] / n - mean_margin * mean_length
    return {"rewards/margins_by_length": together / math.sqrt(margin * length)}
