"""The diagnosis of a step: against plain arithmetic pair by pair, and the same however the pairs are parted."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from prefopt_dist.batching.packing import pack
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.row_counts import DataReport
from prefopt_dist.data.unit import Unit
from prefopt_dist.monitoring import timers
from prefopt_dist.monitoring.statistics import BIN_EDGES, quantile
from prefopt_dist.objectives import (
    CPO,
    DPO,
    IPO,
    KTO,
    ORPO,
    SFT,
    AlphaPO,
    APODown,
    APOZero,
    BCOPair,
    CalDPO,
    DiscoPOP,
    DPOPositive,
    EXOPair,
    Hinge,
    Mix,
    MixPart,
    NCAPair,
    Objective,
    Sequences,
    SimPO,
    SPPOHard,
    WithSFT,
)
from prefopt_dist.training.diagnosis import Diagnosis, saturated, source_labels

N = 60
DRAW = np.random.RandomState(0)
LENGTHS = DRAW.randint(1, 30, size=(N, 2))
LENGTHS[:5, 1] = LENGTHS[:5, 0]
SUMS = torch.from_numpy(-LENGTHS * (1 + DRAW.rand(N, 2)))
REFERENCE = torch.from_numpy(-LENGTHS * (1 + DRAW.rand(N, 2)))
SOURCE = DRAW.randint(0, 3, size=N).astype(np.int32)
SETS = ("a/one.jsonl", "a/two.jsonl", "b/three.jsonl")


def rows(names: tuple[str, ...] = SETS) -> TokenisedRows:
    """Of a data set only what the diagnosis asks for counts."""
    nothing: Any = np.zeros(0)
    report = DataReport(N, N, {}, {}, {}, 0, "pair", {}, "digest")
    source = SOURCE if len(names) > 1 else np.zeros(N, np.int32)
    named = (names, (1.0,) * len(names), report)
    return TokenisedRows("pair", N, 2, nothing, nothing, None, nothing, None, source, nothing, nothing, *named)


def diagnosed(objective: Objective, parts: list[list[int]], *, desirable: np.ndarray | None = None) -> dict[str, Any]:
    """Of micro-batches of these rows, each by a rank of its own; the ranks' sums added up."""
    total = torch.zeros(1)
    diagnosis = Diagnosis(objective, rows(), torch.device("cpu"))
    width = objective.responses
    for part in parts:
        units = [
            Unit(
                i,
                np.array([i + 1], np.int32),
                tuple(np.full(LENGTHS[i, k], k + 1, np.int32) for k in range(width)),
                desirable is None or bool(desirable[i]),
            )
            for i in part
        ]
        batch = pack(units, width)
        reference = REFERENCE[part, :width] if objective.needs_reference else None
        sums = SUMS[part, :width].clone().requires_grad_()
        terms = objective(Sequences(sums, batch.counts[batch.units], reference, batch.desirable))
        diagnosis.add(objective, terms, batch, reference)
        total = total + diagnosis.take()
    assert diagnosis.take().abs().sum() == 0
    return diagnosis.metrics(total.tolist())


def test_every_number_is_that_of_plain_arithmetic() -> None:
    found = diagnosed(DPO(0.5), [list(range(N))])
    s, r, n = SUMS.numpy(), REFERENCE.numpy(), LENGTHS
    margin = 0.5 * ((s - r)[:, 0] - (s - r)[:, 1])
    longer, shorter, won = n[:, 0] > n[:, 1], n[:, 0] < n[:, 1], margin > 0
    exact = {
        "logps/chosen_per_token": s[:, 0].sum() / n[:, 0].sum(),
        "logps/rejected_per_token": s[:, 1].sum() / n[:, 1].sum(),
        "logratio/chosen_per_token": (s - r)[:, 0].sum() / n[:, 0].sum(),
        "logratio/rejected_per_token": (s - r)[:, 1].sum() / n[:, 1].sum(),
        "lengths/chosen": n[:, 0].mean(),
        "lengths/rejected": n[:, 1].mean(),
        "logps/accuracies_per_token": (s[:, 0] / n[:, 0] > s[:, 1] / n[:, 1]).mean(),
        "reference/accuracies": (r[:, 0] > r[:, 1]).mean(),
        "reference/accuracies_per_token": (r[:, 0] / n[:, 0] > r[:, 1] / n[:, 1]).mean(),
        "lengths/chosen_longer": longer.mean(),
        "lengths/chosen_shorter": shorter.mean(),
        "rewards/accuracies_chosen_longer": won[longer].mean(),
        "rewards/accuracies_chosen_shorter": won[shorter].mean(),
        "saturated": (1 / (1 + np.exp(margin)) < 0.01 * 0.5).mean(),  # σ(−m) against σ(0)
        "rewards/margins_by_length": np.corrcoef(margin, n[:, 0] - n[:, 1])[0, 1],
    }
    for i, name in enumerate(("one.jsonl", "two.jsonl", "three.jsonl")):
        exact[f"rewards/accuracies_of/{name}"] = won[i == SOURCE].mean()
        exact[f"rewards/margins_of/{name}"] = margin[i == SOURCE].mean()
        exact[f"pairs_of/{name}"] = (i == SOURCE).sum()
    histogram = found.pop("rewards/margins_histogram")
    for q, share in (("p10", 10), ("p50", 50), ("p90", 90)):
        # A bin is a factor of 1.47 wide.
        exactly = np.percentile(margin, share, method="inverted_cdf")
        assert found.pop(f"rewards/margins_{q}") == pytest.approx(exactly, rel=0.5)
    assert found == pytest.approx(exact, rel=1e-12)
    assert 0 < exact["saturated"] < 1
    edges = [-math.inf, *BIN_EDGES, math.inf]
    assert histogram == np.histogram(margin, edges)[0].tolist()
    assert sum(histogram) == N


PARTS = [list(range(7)), [], list(range(7, 31)), [31], list(range(32, N))]


@pytest.mark.parametrize(
    "objective",
    [
        *(DPO(0.1), DPO(5.0, per_token=True), IPO(0.2), Hinge(0.1), SimPO(2.0, 1.0), ORPO(0.1), WithSFT(DPO(0.1), 0.5)),
        *(loss(0.1) for loss in (APODown, APOZero, BCOPair, CalDPO, DiscoPOP, DPOPositive, EXOPair, NCAPair, SPPOHard)),
        *(CPO(0.1), AlphaPO(2.0, 0.5, 0.2)),
        Mix((MixPart("dpo", 0.5, DPO(0.1)), MixPart("simpo", 1.0, SimPO(2.0, 1.0)), MixPart("sft", 0.1, SFT()))),
    ],
    ids=lambda o: type(o).__name__,
)
def test_it_is_the_same_however_the_pairs_are_parted(objective: Objective) -> None:
    whole, parted = diagnosed(objective, [list(range(N))]), diagnosed(objective, PARTS)
    assert parted.pop("rewards/margins_histogram") == whole.pop("rewards/margins_histogram")
    assert parted == pytest.approx(whole, rel=1e-9)
    assert ("reference/accuracies" in whole) == objective.needs_reference
    assert ("logratio/chosen_per_token" in whole) == objective.needs_reference


def test_rated_rows_are_told_apart_by_their_label() -> None:
    good = np.arange(N) % 3 == 0
    kto = KTO(0.1, z0=torch.tensor(0.0, dtype=torch.float64))
    found = diagnosed(kto, PARTS, desirable=good)
    s, r, n = SUMS.numpy()[:, 0], REFERENCE.numpy()[:, 0], LENGTHS[:, 0]
    assert found == pytest.approx(
        {
            "logps/chosen_per_token": s[good].sum() / n[good].sum(),
            "logps/rejected_per_token": s[~good].sum() / n[~good].sum(),
            "logratio/chosen_per_token": (s - r)[good].sum() / n[good].sum(),
            "logratio/rejected_per_token": (s - r)[~good].sum() / n[~good].sum(),
            "lengths/chosen": n[good].mean(),
            "lengths/rejected": n[~good].mean(),
        }
    )
    assert diagnosed(SFT(), PARTS).keys() == {"logps/chosen_per_token", "lengths/chosen"}
    assert diagnosed(SFT(), [[]]) == {}


def test_saturation_is_of_the_slope_whatever_the_loss() -> None:
    counts = torch.tensor([[10, 10], [10, 10], [10, 10]])
    reference = torch.full((3, 2), -20.0, dtype=torch.float64)

    def of(objective: Objective, *margins: float) -> list[bool]:
        sums = reference.clone()
        sums[:, 0] += torch.tensor(margins, dtype=torch.float64)
        units = Sequences(sums, counts, reference if objective.needs_reference else None)
        return saturated(objective, units).tolist()

    # DPO: σ(−m) < 0.005 from m = 5.29 on; the hinge ends at 1; IPO has no pull at its aim 1/(2β) alone.
    assert of(DPO(1.0), 0.0, 5.2, 5.4) == [False, False, True]
    assert of(Hinge(1.0), 0.0, 0.9, 1.1) == [False, False, True]
    assert of(IPO(0.5, per_token=False), 0.0, 1.0, 3.0) == [False, True, False]
    # Without reference the level is that of equal means: SimPO's σ(γ − m) against σ(γ).
    assert of(SimPO(10.0, 1.0), 0.0, 5.8, 6.1) == [False, False, True]
    # APO-zero's pull is the slope of σ at the chosen reward: at 0 a quarter, σ(r)σ(−r) < 1/400 from 6.0 on.
    assert of(APOZero(1.0), 0.0, 5.9, 6.1) == [False, False, True]
    # An SFT term pulls for ever.
    assert of(WithSFT(DPO(1.0), 1.0), 0.0, 5.4, 50.0) == [False, False, False]


def test_quantiles_of_bins() -> None:
    counts = [0.0] * (len(BIN_EDGES) + 1)
    assert math.isnan(quantile(counts, 0.5))
    counts[0] = counts[-1] = 1
    assert quantile(counts, 0.1) == -100
    assert quantile(counts, 0.9) == 100
    middle = list(BIN_EDGES).index(0.0)
    counts = [0.0] * len(counts)
    counts[middle] = 4  # [−0.01, 0)
    assert quantile(counts, 0.5) == pytest.approx(-0.005)


def test_equal_margins_have_no_correlation() -> None:
    """Before the first update all margins are 0."""
    diagnosis = Diagnosis(DPO(0.1), rows(("one",)), torch.device("cpu"))
    counts = torch.tensor([[3, 5], [7, 2]])
    sums = -counts.double()
    units = [
        Unit(i, np.array([9], np.int32), (np.ones(a, np.int32), np.ones(b, np.int32)))
        for i, (a, b) in enumerate(counts.tolist())
    ]
    batch = pack(units, 2)
    diagnosis.add(DPO(0.1), DPO(0.1)(Sequences(sums, counts, sums)), batch, sums)
    found = diagnosis.metrics(diagnosis.take().tolist())
    assert "rewards/margins_by_length" not in found
    assert "pairs_of/one" not in found
    assert found["rewards/accuracies_chosen_shorter"] == 0


def test_source_labels_tell_sources_apart() -> None:
    assert source_labels(["data/a.jsonl", "data/b.jsonl"]) == ("a.jsonl", "b.jsonl")
    assert source_labels(["/x/a.jsonl", "/y/a.jsonl"]) == ("x:a.jsonl", "y:a.jsonl")


def test_the_slowest_rank_is_named() -> None:
    work = ((1.0, 10.0), (4.0, 24.0), (2.0, 14.0))
    steps = [
        [timers.rank_work_slots(rank, 3, *seconds_flop) for rank, seconds_flop in enumerate(work)] for _ in range(5)
    ]
    sums = np.sum(steps, axis=(0, 1)).tolist()
    found = timers.rank_work_metrics(sums)
    assert found.pop("perf/slowest_rank_load") == 2.0
    assert found.pop("perf/memory_gib") == pytest.approx(timers.memory_now() / 2**30, rel=0.2)
    assert found == {"perf/slowest_rank": 1, "perf/slowest_rank_seconds": 4.0, "perf/other_ranks_seconds": 1.5}
    assert timers.rank_work_metrics(timers.rank_work_slots(0, 1, 1.0, 1.0)).keys() == {"perf/memory_gib"}
