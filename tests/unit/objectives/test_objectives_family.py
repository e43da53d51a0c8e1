"""Every loss on pairs against its paper in float64: values, gradients, extremes, closed forms, metrics."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import plain
import pytest
import torch
from loss_family import FAMILY, called, made

from prefopt_dist.config.losses import LOSSES, NOT_MIXED
from prefopt_dist.objectives import IPO, ORPO, Hinge, Objective, Sequences, SimPO, WithSFT
from prefopt_dist.objectives.reference_free import CERTAIN, log1mexp, log_odds


def drawn(
    n: int, *, longest: int = 200, seed: int = 0, apart: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log π, log π_ref and lengths, [n, 2]; a token has 0 to 2 nats, lengths begin with 1, 1 and are very unequal.

    log π_ref differs by the share `apart` of it times a normal number.
    """
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n, 2), generator=draw)
    lengths[0], lengths[1], lengths[2], lengths[3] = (
        torch.tensor(pair) for pair in ((1, 1), (1, longest), (longest, 1), (17, 17))
    )
    tokens = 2 * torch.rand(n, 2, generator=draw, dtype=torch.float64) + 1e-3
    sums = -tokens * lengths
    return sums, sums * (1 + apart * torch.randn(n, 2, generator=draw, dtype=torch.float64)), lengths


def slope(loss: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss.sum(), sums)
    return found


def units(objective: Objective, sums: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> Sequences:
    return Sequences(sums, lengths, reference if objective.needs_reference else None)


def test_the_family_has_every_loss_on_pairs() -> None:
    """KTO, SFT, AOT and the losses on ranked rows have tests of their own; a mix is no entry."""
    others = {"kto", "sft", "aot", "aot_unpaired", "plackett_luce", "all_pairs"}
    assert {options["name"] for options in FAMILY} == LOSSES.keys() - others | {"mix"}


@pytest.mark.parametrize("options", FAMILY, ids=called)
def test_losses_equal_their_papers(options: dict[str, Any]) -> None:
    objective = made(options)
    # Of a divergence up to e⁸⁰ = t⁻¹, beyond which the loss is another one than the paper's on purpose.
    sums, reference, lengths = drawn(60, apart=0.05 if "divergence" in options else 0.2)
    sums.requires_grad_()
    found = objective(units(objective, sums, reference, lengths))
    loss, reward = plain.pair_loss(options, sums, reference, lengths.double())
    means = dict(zip(objective.metrics, found.per_unit.unbind(1), strict=True))
    torch.testing.assert_close(means["loss"], loss.detach(), rtol=1e-11, atol=1e-12)
    assert found.loss.item() == pytest.approx(loss.sum().item(), rel=1e-11)
    torch.testing.assert_close(slope(found.loss, sums), slope(loss, sums), rtol=1e-9, atol=1e-13)
    for k, response in enumerate(("chosen", "rejected")):
        torch.testing.assert_close(means[f"rewards/{response}"], reward[:, k].detach(), rtol=1e-12, atol=1e-13)
        assert torch.equal(means[f"logps/{response}"], sums[:, k].detach())
        if objective.needs_reference:  # summed whatever the loss averages
            torch.testing.assert_close(means[f"logratio/{response}"], (sums - reference)[:, k].detach())
    margin = (reward[:, 0] - reward[:, 1]).detach()
    torch.testing.assert_close(means["rewards/margins"], margin, rtol=1e-11, atol=1e-12)
    assert torch.equal(means["rewards/accuracies"], (margin > 0).double())
    assert means["ties"].sum() == 0
    if "sft_loss" in means:
        torch.testing.assert_close(means["sft_loss"], (-sums[:, 0] / lengths[:, 0]).detach())


@pytest.mark.parametrize("options", FAMILY, ids=called)
def test_terms_are_sums_over_units_of_their_own(options: dict[str, Any]) -> None:
    objective = made(options)
    sums, reference, lengths = drawn(7)
    sums.requires_grad_()
    whole = objective(units(objective, sums, reference, lengths))
    assert whole.loss.dtype == whole.statistics.dtype == whole.per_unit.dtype == torch.float64
    assert whole.per_unit.shape == (7, len(objective.metrics))
    assert len(set(objective.metrics)) == len(objective.metrics)
    assert objective.metrics[0] == "loss"
    assert whole.loss.requires_grad
    assert not any(t.requires_grad for t in (whole.statistics, whole.per_unit, whole.sums))
    assert whole.statistics[0].item() == pytest.approx(whole.loss.item(), rel=1e-13)
    torch.testing.assert_close(whole.statistics, whole.per_unit.sum(0))
    parts = [objective(units(objective, sums[a:b], reference[a:b], lengths[a:b])) for a, b in ((0, 3), (3, 3), (3, 7))]
    assert torch.equal(torch.cat([p.per_unit for p in parts]), whole.per_unit)
    assert parts[1].loss.item() == 0
    parts[1].loss.backward()  # an empty micro-batch takes part in the backward


def form(name: str, options: dict[str, Any]) -> float | None:
    """The loss where policy and reference are equal, by hand; None where it depends on the data."""
    beta, eps = options.get("beta", 1.0), options.get("label_smoothing", 0.0)
    if options.get("sft_weight") or name in ("simpo", "alphapo", "cpo", "orpo", "sft"):
        return None
    if name == "exo_pair":
        return math.log(1 / (2 * math.sqrt(eps * (1 - eps))))
    return {
        **dict.fromkeys(("dpo", "robust", "dpop"), math.log(2)),
        **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
        **dict.fromkeys(("bco_pair", "nca_pair"), 2 * math.log(2)),
        "ipo": 0.25 * beta**-2,
        "discopop": (1 + math.log(2)) / 2,
        "sppo_hard": 0.5 * beta**-2,
        "cal_dpo": math.log(2) + 0.25 * beta**-2,
    }[name]


@pytest.mark.parametrize("options", FAMILY, ids=called)
def test_closed_form_at_the_start(options: dict[str, Any]) -> None:
    """Policy and reference equal: each pair has the same loss, which the step-0 check requires."""
    objective = made(options)
    sums, _, lengths = drawn(20)
    found = objective(units(objective, sums, sums, lengths))
    parts = options["of"] if options["name"] == "mix" else {options["name"]: {"weight": 1.0, **options}}
    forms = [(part["weight"], form(name, part)) for name, part in parts.items()]
    if any(value is None for _, value in forms):
        assert objective.start_loss is None
        return
    value = sum(weight * value for weight, value in forms)
    assert objective.start_loss == pytest.approx(value, rel=1e-15)
    torch.testing.assert_close(found.per_unit[:, 0], torch.full((20,), value, dtype=torch.float64))
    ties = dict(zip(objective.metrics, found.per_unit.unbind(1), strict=True))["ties"]
    assert torch.equal(ties, torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("margin", [1e3, -1e3, 1e6, -1e6])
@pytest.mark.parametrize("options", FAMILY, ids=called)
def test_extreme_margins(options: dict[str, Any], margin: float) -> None:
    """Far from 0 every loss is finite, as exact as float64, and its gradient is that of its straight line."""
    objective = made(options)
    sums = torch.tensor([[-abs(margin) - 20 + margin / 2, -abs(margin) - 20 - margin / 2]], dtype=torch.float64)
    sums.requires_grad_()
    lengths = torch.tensor([[1, 1]])
    found = objective(units(objective, sums, torch.full_like(sums, -20.0).detach(), lengths))
    got = slope(found.loss, sums)
    assert torch.isfinite(found.per_unit).all()
    with mpmath.workdps(60):
        exact = _exact(options, [mpmath.mpf(v) for v in sums[0].tolist()])
        chosen, rejected = (
            mpmath.diff(
                lambda v, k=k: _exact(
                    options, [v if i == k else mpmath.mpf(s) for i, s in enumerate(sums[0].tolist())]
                ),
                sums[0, k].item(),
            )
            for k in (0, 1)
        )
    assert found.loss.item() == pytest.approx(float(exact), rel=1e-12, abs=1e-300)
    assert got[0].tolist() == [pytest.approx(float(v), rel=1e-9, abs=1e-12) for v in (chosen, rejected)]


def _exact(options: dict[str, Any], s: list[Any]) -> Any:
    """The loss of one pair of one-token responses whose reference is −20 each, in 60 digits."""
    if options["name"] == "mix":
        return sum(mpmath.mpf(o["weight"]) * _exact({"name": n, **o}, s) for n, o in options["of"].items())
    if options["name"] == "sft":
        return -s[0]
    beta, name = mpmath.mpf(options["beta"]), options["name"]

    def ell(x: Any) -> Any:
        return mpmath.log(1 + mpmath.exp(-x))

    h, eps = s[0] - s[1], mpmath.mpf(options.get("label_smoothing", 0))
    if "divergence" in options:
        h = _score(s[0] + 20, options) - _score(s[1] + 20, options)
    if name == "dpo":
        loss = (1 - eps) * ell(beta * h) + eps * ell(-beta * h)
    elif name == "robust":
        loss = ((1 - eps) * ell(beta * h) - eps * ell(-beta * h)) / (1 - 2 * eps)
    elif name == "ipo":
        loss = (h - 1 / (2 * beta)) ** 2
    elif name == "hinge":
        loss = max(mpmath.mpf(0), 1 - beta * h)
    elif name == "simpo":
        loss = ell(beta * h - options["gamma"])
    elif name == "alphapo":
        r = [beta * (1 - _power(-mpmath.mpf(options["alpha"]) * v)) / mpmath.mpf(options["alpha"]) for v in s]
        loss = ell(r[0] - r[1] - options["gamma"])
    elif name == "cpo":
        loss = (1 - eps) * ell(beta * h) + eps * ell(-beta * h)
    elif name in ANCHORED:
        loss = ANCHORED[name](s[0] + 20, s[1] + 20, beta, ell, options)
    elif name == "exo_pair":
        loss = -ell(beta * h) * _sigma(beta * h) - ell(-beta * h) * _sigma(-beta * h)
        loss -= _sigma(beta * h) * mpmath.log(1 - eps) + _sigma(-beta * h) * mpmath.log(eps)
    elif name == "discopop":
        share = beta * h / mpmath.mpf(options["temperature"])
        loss = ell(beta * h) * _sigma(-share) + mpmath.exp(-beta * h) * _sigma(share)
    else:
        loss = -s[0] + beta * ell(_log_odds(s[0]) - _log_odds(s[1]))
    return loss - mpmath.mpf(options.get("sft_weight", 0)) * s[0]


def _score(logratio: Any, options: dict[str, Any]) -> Any:
    """f'(t) of an f-divergence, with powers beyond e⁸⁰ as `_power` has them."""
    if options["divergence"] == "jensen_shannon":
        return mpmath.log(2) - mpmath.log(1 + mpmath.exp(-logratio))
    exponent = -1 if options["divergence"] == "forward_kl" else mpmath.mpf(options.get("divergence_alpha", 0.5)) - 1
    return (_power(exponent * logratio) - 1) / exponent


def _sigma(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def _power(x: Any) -> Any:
    """eˣ, beyond 80 its tangent."""
    return mpmath.exp(min(x, 80)) * (1 + max(x - 80, 0))


ANCHORED: dict[str, Any] = {
    "apo_zero": lambda c, r, beta, ell, o: _sigma(-beta * c) + _sigma(beta * r),
    "apo_down": lambda c, r, beta, ell, o: _sigma(beta * c) + _sigma(-beta * (c - r)),
    "bco_pair": lambda c, r, beta, ell, o: ell(beta * c) + ell(-beta * r),
    "nca_pair": lambda c, r, beta, ell, o: ell(beta * c) + (ell(-beta * c) + ell(-beta * r)) / 2,
    "sppo_hard": lambda c, r, beta, ell, o: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
    "cal_dpo": lambda c, r, beta, ell, o: ell(c - r) + ((c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2) / 2,
    "dpop": lambda c, r, beta, ell, o: ell(beta * (c - r - o["penalty"] * max(-c, 0))),
}
"""Losses of both log-ratios in nats, in 60 digits."""


def _log_odds(logp: Any) -> Any:
    p = mpmath.exp(logp)
    return mpmath.log(p / (1 - p))


# ORPO's odds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logp", [-1e-7, -1e-6, -1e-3, -0.1, -0.69314, -0.69315, -0.7, -5.0, -80.0, -1e3, -1e6])
def test_log_odds_from_p_near_1_to_p_near_0(logp: float, dtype: torch.dtype) -> None:
    """Value and slope 1/(1 − p) to a few roundings of the dtype."""
    x = torch.tensor([logp], dtype=dtype, requires_grad=True)
    found = log_odds(x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    with mpmath.workdps(500):
        given = mpmath.mpf(x.item())
        value, slope_, low = _log_odds(given), 1 / (1 - mpmath.exp(given)), mpmath.log(1 - mpmath.exp(given))
    rounding = 8 * torch.finfo(dtype).eps
    assert found.item() == pytest.approx(float(value), rel=rounding, abs=rounding)
    assert gradient.item() == pytest.approx(float(slope_), rel=rounding)
    assert log1mexp(x).item() == pytest.approx(float(low), rel=rounding, abs=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("sums", [[0.0, -5.0], [-5.0, 0.0], [0.0, 0.0], [1e-7, -1e3], [-1e3, -1e-9]])
def test_certain_tokens_have_finite_odds(sums: list[float]) -> None:
    """p = 1 exactly, which float32 reaches: the odds are those of 1 − 2⁻²⁴, and no NaN comes out of the backward."""
    live = torch.tensor([sums], dtype=torch.float64, requires_grad=True)
    objective = ORPO(0.5)
    found = objective(Sequences(live, torch.tensor([[1, 1]]), None))
    assert torch.isfinite(found.per_unit).all()
    assert torch.isfinite(slope(found.loss, live)).all()
    shown = dict(zip(objective.metrics, found.per_unit[0].tolist(), strict=True))
    with mpmath.workdps(50):
        capped = [_log_odds(mpmath.mpf(min(s, CERTAIN))) for s in sums]
    assert shown["log_odds_ratio"] == pytest.approx(float(capped[0] - capped[1]), rel=1e-12, abs=1e-12)


SMALLEST = -(2.0**-23)
"""A mean log-prob that float32 has next to 0."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [SMALLEST, -1e-5, -0.1, -3.0, -60.0, -1e4])
@pytest.mark.parametrize("rejected", [SMALLEST, -0.5, -1e4])
def test_orpo_from_p_near_1_to_p_near_0(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    """The whole loss and both slopes, a few roundings of the dtype from 60 digits (an even ratio cancels: absolute)."""
    sums = torch.tensor([[chosen * 4, rejected * 8]], dtype=dtype, requires_grad=True)
    found = ORPO(0.5)(Sequences(sums, torch.tensor([[4, 8]]), None))
    got = slope(found.loss, sums)
    options = {"name": "orpo", "beta": 0.5}
    with mpmath.workdps(60):
        means = [mpmath.mpf(s) / n for s, n in zip(sums[0].tolist(), (4, 8), strict=True)]
        value = _exact(options, means)
        ratio = _log_odds(means[0]) - _log_odds(means[1])
        pull = mpmath.mpf(0.5) / (1 + mpmath.exp(ratio))
        slopes = [
            (-1 - pull / (1 - mpmath.exp(means[0]))) / 4,
            pull / (1 - mpmath.exp(means[1])) / 8,
        ]
    eps = torch.finfo(dtype).eps
    assert found.loss.item() == pytest.approx(float(value), rel=20 * eps, abs=20 * eps * float(1 + abs(ratio)))
    for mine, exact in zip(got[0].tolist(), slopes, strict=True):
        assert mine == pytest.approx(float(exact), rel=20 * eps * float(1 + abs(ratio)), abs=1e-30)


def test_the_naive_odds_are_dead_in_float32() -> None:
    """What the form in use is for: log(1 − eˣ) as it is written is −∞ near p = 1 and 0 near p = 0."""
    near_1, near_0 = torch.tensor(-2e-8), torch.tensor(-30.0)
    assert torch.log(1 - torch.exp(near_1)).item() == -math.inf
    assert torch.log(1 - torch.exp(near_0)).item() == 0
    assert log1mexp(torch.tensor(CERTAIN)).item() == pytest.approx(-24 * math.log(2), rel=1e-6)
    assert log1mexp(near_0).item() == pytest.approx(-math.exp(-30), rel=1e-6)


def test_orpo_by_hand() -> None:
    """p = 0.8 and 0.5 a token: odds 4 and 1, log OR = ln 4, loss −ln 0.8 + β ln(1 + ¼)."""
    sums = torch.tensor([[3 * math.log(0.8), 7 * math.log(0.5)]], dtype=torch.float64)
    objective = ORPO(2.0)
    found = objective(Sequences(sums, torch.tensor([[3, 7]]), None))
    shown = dict(zip(objective.metrics, found.per_unit[0].tolist(), strict=True))
    assert shown["log_odds_ratio"] == pytest.approx(math.log(4), rel=1e-14)
    assert shown["sft_loss"] == pytest.approx(-math.log(0.8), rel=1e-14)
    assert shown["loss"] == pytest.approx(-math.log(0.8) + 2 * math.log(1.25), rel=1e-14)
    assert shown["rewards/margins"] == pytest.approx(2 * math.log(1.6), rel=1e-14)


# What is special to one loss


def test_ipo_rests_at_its_target() -> None:
    """A margin of 1/(2β) per token has no loss and no gradient; rewards are then ½ apart."""
    sums = torch.tensor([[-10.0, -40.0]], dtype=torch.float64, requires_grad=True)
    objective = IPO(0.25)
    found = objective(Sequences(sums, torch.tensor([[10, 20]]), torch.tensor([[-20.0, -20.0]]).double()))
    assert found.loss.item() == 0
    assert slope(found.loss, sums).abs().max() == 0
    assert dict(zip(objective.metrics, found.per_unit[0].tolist(), strict=True))["rewards/margins"] == 0.5


@pytest.mark.parametrize(("margin", "gradient"), [(0.99, -0.1), (1.0, 0.0), (1.01, 0.0), (-50.0, -0.1)])
def test_hinge_is_satisfied_at_one(margin: float, gradient: float) -> None:
    sums = torch.tensor([[-100.0 + margin * 8, -100.0]], dtype=torch.float64, requires_grad=True)
    found = Hinge(0.125)(Sequences(sums, torch.tensor([[10, 20]]), torch.full((1, 2), -100.0).double()))
    wanted = gradient * 1.25
    assert slope(found.loss, sums).tolist() == [[pytest.approx(wanted), pytest.approx(-wanted)]]
    assert found.loss.item() == pytest.approx(max(0.0, 1 - margin), abs=1e-12)


def test_robust_is_dpo_on_average_over_flips() -> None:
    """(1 − ε) L(m) + ε L(−m) = −log σ(m): the expectation over flipped labels is DPO's loss on the true ones."""
    options = {"name": "robust", "beta": 0.2, "label_smoothing": 0.3}
    sums, reference, lengths = drawn(30)
    objective = made(options)
    true = objective(Sequences(sums, lengths, reference)).per_unit[:, 0]
    flipped = objective(Sequences(sums.flip(1), lengths.flip(1), reference.flip(1))).per_unit[:, 0]
    dpo = made({"name": "dpo", "beta": 0.2})(Sequences(sums, lengths, reference)).per_unit[:, 0]
    torch.testing.assert_close(0.7 * true + 0.3 * flipped, dpo, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [o for o in FAMILY if ("tokens" in o.values() or o["name"] == "simpo") and "divergence" not in o],
    ids=called,
)
def test_losses_per_token_know_no_length(options: dict[str, Any]) -> None:
    objective = made(options)
    sums, reference, lengths = drawn(20)
    longer = torch.tensor([[3, 7]])
    a = objective(units(objective, sums, reference, lengths)).per_unit[:, 0]
    b = objective(units(objective, sums * longer, reference * longer, lengths * longer)).per_unit[:, 0]
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_ties_per_token_are_relative_to_the_mean() -> None:
    """Two sequences that differ by rounding are a tie however long they are, and one nat a token is none."""
    objective = SimPO(2.0, 1.0)
    sums = torch.tensor([[-100.0, -300.0003], [-100.0, -600.0]], dtype=torch.float64)
    found = objective(Sequences(sums, torch.tensor([[10, 30], [10, 30]]), None))
    rows = [dict(zip(objective.metrics, row, strict=True)) for row in found.per_unit.tolist()]
    assert [(r["ties"], r["rewards/accuracies"]) for r in rows] == [(1, 0), (0, 1)]


def test_nan_is_not_hidden() -> None:
    for options in FAMILY:
        objective = made(options)
        sums = torch.tensor([[math.nan, -1.0], [-2.0, -1.0]], dtype=torch.float64)
        found = objective(units(objective, sums, sums - 1, torch.tensor([[3, 3], [3, 3]])))
        assert math.isnan(found.loss.item()), options
        shown = dict(zip(objective.metrics, found.per_unit[0].tolist(), strict=True))
        assert (shown["rewards/accuracies"], shown["ties"]) == (0, 0), options


def test_a_mix_shows_its_parts() -> None:
    """Each part's loss under its own name, as it is alone; the rewards are those of the first in the registry."""
    sums, reference, lengths = drawn(9)
    parts = {"orpo": {"weight": 0.2, "beta": 0.5}, "ipo": {"weight": 0.3}, "dpo": {"weight": 2, "beta": 0.2}}
    objective = made({"name": "mix", "of": parts})
    shown = dict(zip(objective.metrics, objective(Sequences(sums, lengths, reference)).per_unit.unbind(1), strict=True))
    for name, part in parts.items():
        options = {k: v for k, v in part.items() if k != "weight"}
        alone = made({"name": name, **options})
        found = alone(units(alone, sums, reference, lengths)).per_unit.unbind(1)
        own = dict(zip(alone.metrics, found, strict=True))
        assert torch.equal(shown[f"{name}_loss"], own.pop("loss"))
        for metric, values in own.items():
            if name == "dpo" or not metric.startswith("rewards/"):
                assert torch.equal(shown[metric], values), (name, metric)
    total = sum(part["weight"] * shown[f"{name}_loss"] for name, part in parts.items())
    torch.testing.assert_close(shown["loss"], total, rtol=1e-14, atol=0)
    assert objective == made({"name": "mix", "of": dict(reversed(parts.items()))}), "the file's order decides nothing"


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("orpo", "sft", *NOT_MIXED)])
def test_sft_in_a_mix_is_the_sft_weight_of_one_loss(name: str) -> None:
    sums, reference, lengths = drawn(9)
    one, mix = (
        made(options)
        for options in (
            {"name": name, "sft_weight": 0.7},
            {"name": "mix", "of": {"sft": {"weight": 0.7}, name: {"weight": 1.0}}},
        )
    )
    assert mix.needs_reference == one.needs_reference
    a, b = (o(units(o, sums, reference, lengths)) for o in (one, mix))
    columns = [mix.metrics.index(metric) for metric in one.metrics]
    torch.testing.assert_close(b.per_unit[:, columns], a.per_unit, rtol=1e-14, atol=0)
    assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-14)


def test_cpo_in_a_mix_has_no_term_of_its_own() -> None:
    """Alone its default is the paper's loss, with the likelihood; in a mix that is the part sft."""
    assert isinstance(made({"name": "cpo"}), WithSFT)
    mix = made({"name": "mix", "of": {"cpo": {"weight": 1.0}, "ipo": {"weight": 1.0}}})
    assert "sft_loss" not in mix.metrics


@pytest.mark.parametrize(("fall", "slopes"), [(0.0, (-0.05, 0.05)), (1e-5, (-0.05, 0.05)), (1.0, None)])
def test_dpop_takes_a_fall_within_rounding_for_none(fall: float, slopes: tuple[float, float] | None) -> None:
    """At the start the sign of a rounding error would else decide between two slopes, β/2 and (1 + λ) β/2."""
    objective = made({"name": "dpop", "beta": 0.1, "penalty": 5.0})
    sums = torch.tensor([[-20.0 - fall, -20.0]], dtype=torch.float64, requires_grad=True)
    found = slope(objective(Sequences(sums, torch.tensor([[4, 8]]), torch.full((1, 2), -20.0).double())).loss, sums)
    if slopes is not None:
        assert found[0].tolist() == pytest.approx(slopes, rel=1e-4)
    else:
        pull = 0.1 / (1 + math.exp(-0.1 * 6 * fall))
        assert found[0].tolist() == pytest.approx((-6 * pull, pull))


def test_an_sft_term_of_weight_0_is_none() -> None:
    assert not isinstance(made(FAMILY[0]), WithSFT)
    assert isinstance(made(FAMILY[1]), WithSFT)
