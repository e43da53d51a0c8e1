"""Diagnostic metrics of a run beside the objective's own, computed from values that a step has anyway.

All of them come from sums over the units, which are added over micro-batches, steps and, in the step's single
all-reduce, ranks.

Of ranked rows the best response counts as the chosen one and the last as the rejected one.

Legend: U units of a micro-batch, R responses of a unit, D sums, B bins of margins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.batching.micro_batch import MicroBatch, to_device
from prefopt_dist.data import TokenisedRows
from prefopt_dist.monitoring.statistics import BIN_EDGES, quantile
from prefopt_dist.objectives import Objective, Sequences, Terms

SATURATED = 0.01
"""The slope below which a pair is saturated: ∂L/∂ log π(chosen), as a share of its value at margin 0."""
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}

_PAIR_SUMS = (
    *("longer", "longer_won", "shorter", "shorter_won", "per_token_won", "saturated"),
    *("margin", "margin²", "length", "length²", "margin·length"),
)


class Diagnosis:
    """Running float64 sums of D values on the device, which are neither read on the host nor sent to another rank."""

    def __init__(self, objective: Objective, rows: TokenisedRows, device: torch.device) -> None:
        """Start from zero.

        Args:
            objective: the objective, which says what a unit is and whether there is a reference.
            rows: the data set of the units; where it has several sources, each gets metrics of its own.
            device: the device of the sums.
        """
        self._pairs = objective.responses >= 2
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
        """[D] names of the sums."""
        self._edges = torch.tensor(BIN_EDGES, dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, objective: Objective, terms: Terms, micro_batch: MicroBatch, reference: torch.Tensor | None) -> None:
        """Add the units of a micro-batch.

        Args:
            objective: the objective.
            terms: its terms of the micro-batch.
            micro_batch: the micro-batch, which has U units.
            reference: float64 [U, R] log-probs of the responses by the reference; None without one.
        """
        units = Sequences(
            sums=terms.sums,
            counts=micro_batch.counts[micro_batch.units],
            reference=reference,
            desirable=micro_batch.desirable,
            weight=micro_batch.weight,
            margin=micro_batch.margin,
            ranks=micro_batch.ranks,
            partner=micro_batch.partner,
            relative=torch.zeros_like(terms.sums),  # a weight that is a common factor of the slopes compared below
        )
        whole = units
        if objective.ranked:
            units = units.best_and_worst()
        n = units.total(torch.ones_like(terms.sums[:, 0]))
        sums = [n, n if self._reference else torch.zeros_like(n)]
        for response in (0, 1):
            sums += self._response_sums(units, response)
        if self._pairs:
            sums += self._pair_sums(units, terms, saturated(objective, whole))
            if self._sources:
                sums += self._source_sums(units, terms, micro_batch)
        self._sums += torch.stack([s.double() for s in sums])

    def take(self) -> torch.Tensor:
        """Return a copy of the sums, float64 [D], for the caller to sum over the ranks, and start from zero again."""
        taken = self._sums.clone()
        self._sums.zero_()
        return taken

    def metrics(self, packed: Sequence[float]) -> dict[str, Any]:
        """Return the metrics of [D] global sums that were read on the host; a metric without units is left out."""
        return _metrics(dict(zip(self.names, packed, strict=True)), self._sources)

    def _response_sums(self, units: Sequences, response: int) -> list[torch.Tensor]:
        """Return number, tokens, log-prob and log-ratio of the chosen (0) or the rejected (1) responses.

        Of rated rows the desirable ones count as chosen and the others as rejected.
        """
        if self._pairs:
            selected, column = torch.ones_like(units.sums[:, 0]), response
        else:
            assert units.desirable is not None
            selected, column = (units.desirable if response == 0 else ~units.desirable).double(), 0
        logp = units.sums[:, column]
        logratio = torch.zeros_like(logp) if units.reference is None else logp - units.reference[:, column]
        # `where` instead of a product, because a NaN or an infinity in a row that is not selected must not count.
        zero = torch.zeros_like(logp)
        values = (selected, units.counts[:, column].double(), logp, logratio)
        return [units.total(torch.where(selected > 0, value, zero)) for value in values]

    def _pair_sums(self, units: Sequences, terms: Terms, saturated: torch.Tensor) -> list[torch.Tensor]:
        """Return the sums of pairs: those of `_PAIR_SUMS`, the reference's where there is one, and the [B] bins.

        Args:
            units: the pairs; of ranked rows the best and the last response.
            terms: of the pairs, or of the whole ranked rows, whose accuracy is a share of their pairs.
            saturated: bool [U].
        """
        margin = terms.per_unit[:, self._columns["rewards/margins"]]
        won = terms.per_unit[:, self._columns["rewards/accuracies"]]
        counts = units.counts.double()
        length = counts[:, 0] - counts[:, 1]
        longer, shorter = length > 0, length < 0
        mean = units.sums / counts
        values = [longer, longer * won, shorter, shorter * won, mean[:, 0] > mean[:, 1], saturated]
        values += [margin, margin.square(), length, length.square(), margin * length]
        if units.reference is not None:
            mean = units.reference / counts
            values += [units.reference[:, 0] > units.reference[:, 1], mean[:, 0] > mean[:, 1]]
        at_least = units.total((margin[:, None] >= self._edges).double())  # [B − 1] margins at or above each edge
        above_lower = torch.cat([units.total(torch.ones_like(margin))[None], at_least])
        above_upper = torch.cat([at_least, at_least.new_zeros(1)])
        return [units.total(v.double()) for v in values] + list((above_lower - above_upper).unbind())

    def _source_sums(self, units: Sequences, terms: Terms, micro_batch: MicroBatch) -> list[torch.Tensor]:
        """Return the number of pairs, the correct ones among them and the sum of margins of each source."""
        won, margin = (terms.per_unit[:, self._columns[f"rewards/{name}"]] for name in ("accuracies", "margins"))
        source = to_device(torch.from_numpy(self._source[list(micro_batch.rows)].astype("int64")), won.device)
        sums = []
        for i in range(len(self._sources)):
            selected = source == i
            sums += [units.total(value) for value in (selected.double(), won * selected, margin * selected)]
        return sums


def saturated(objective: Objective, units: Sequences) -> torch.Tensor:
    """Return which pairs have almost no gradient left, as bool [U], for any loss.

    The slope ∂L/∂ log π(chosen) is compared with that of the same pair at margin 0. The margin is 0 where the policy
    equals the reference, or, for a loss without a reference, where both responses have the chosen one's mean log-prob
    per token.
    """
    at_margin_0 = units.reference
    if at_margin_0 is None:
        at_margin_0 = units.sums[:, :1] / units.counts[:, :1] * units.counts
    return _slope(objective, units, units.sums) < SATURATED * _slope(objective, units, at_margin_0)


def _slope(objective: Objective, units: Sequences, sums: torch.Tensor) -> torch.Tensor:
    """Return |∂L/∂ log π(chosen)| as float64 [U], at the log-probs `sums` [U, R]."""
    with torch.enable_grad():
        leaf = sums.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(replace(units, sums=leaf)).loss, leaf)
    # Of the whole chosen response, and of its beginning where a loss takes that too, as the third of four sequences.
    by_chosen = gradient[:, 0] if objective.ranked else gradient[:, 0::2].sum(1)
    return by_chosen.abs()


def source_labels(names: Sequence[str]) -> tuple[str, ...]:
    """Return the last part of each source's path where these differ, else the whole paths.

    Slashes become colons, because a slash separates the parts of a metric's name.
    """
    last_parts = [Path(name).name for name in names]
    distinct = len(set(last_parts)) == len(last_parts)
    return tuple(
        last if distinct else str(name).strip("/").replace("/", ":")
        for last, name in zip(last_parts, names, strict=True)
    )


def _metrics(sums: Mapping[str, float], sources: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of the global sums by name; `sources` are the labels of the sources."""
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
        found["rewards/margins_histogram"] = [_count(c) for c in counts]
    for label in sources:
        put(f"rewards/accuracies_of/{label}", sums[f"won:{label}"], sums[f"of:{label}"])
        put(f"rewards/margins_of/{label}", sums[f"margin:{label}"], sums[f"of:{label}"])
        found[f"pairs_of/{label}"] = _count(sums[f"of:{label}"])
    return found


def _count(count: float) -> float:
    """Return a count as a whole number, unless it is of pairs with weights."""
    return round(count) if count == round(count) else count


def _correlation(sums: Mapping[str, float]) -> dict[str, float]:
    """Return Pearson's correlation of the margin with the difference in length, chosen − rejected, in tokens."""
    n = sums["units"]
    if n < 2:
        return {}
    mean_margin, mean_length = sums["margin"] / n, sums["length"] / n
    margin = sums["margin²"] / n - mean_margin**2
    length = sums["length²"] / n - mean_length**2
    # Before the first update all margins are equal: their variance is then only rounding.
    if margin <= 1e-9 * (mean_margin**2 + 1e-3) or length <= 0:
        return {}
    covariance = sums["margin·length"] / n - mean_margin * mean_length
    return {"rewards/margins_by_length": covariance / math.sqrt(margin * length)}
