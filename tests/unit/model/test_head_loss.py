"""The gradient that the head forms in its forward pass: as the backward pass's and as float64's, and its products."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
from flop_counting import counting
from loss_family import FAMILY, called, made
from models_for_tests import VOCABULARY, apart, gradients, make, pairs, plain_sums, references, worst

from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model import head
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import KTO, SFT, Objective, Sequences

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = [1, 25, 60, 10**6]
"""Rows of a block: fewer than any prompt's states; one or several prompts and none of the largest; all."""


def backward_pass(
    scorer: Scorer, batch: MicroBatch, objective: Objective, reference: torch.Tensor | None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Terms and gradients by plain autograd over the log-probs."""
    scorer.zero_grad()
    sums = scorer.sequence_sums(batch)
    units = Sequences(sums[batch.units], batch.counts[batch.units], reference, batch.desirable)
    terms = objective(units)
    (terms.loss * 0.37).backward()
    return terms, gradients(scorer.lm)


def forward_pass(
    scorer: Scorer, batch: MicroBatch, objective: Objective, reference: torch.Tensor | None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The same by the head."""
    scorer.zero_grad()
    terms = scorer(batch, objective, reference)
    (terms.loss * 0.37).backward()
    return terms, gradients(scorer.lm)


def check_equal(scorer: Scorer, batch: MicroBatch, objective: Objective, reference: torch.Tensor | None) -> None:
    expected, wanted = backward_pass(scorer, batch, objective, reference)
    terms, found = forward_pass(scorer, batch, objective, reference)
    # Not the same bits: a product of other rows rounds differently.
    assert terms.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert apart(terms.sums, expected.sums) <= 1e-6
    for got, want in ((terms.statistics, expected.statistics), (terms.per_unit, expected.per_unit)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-4)
    assert terms.loss.item() == pytest.approx(terms.statistics[0].item(), rel=1e-12)
    error, tensor = worst(found, wanted)
    assert error <= 3e-6, f"{tensor}: {error}"


@pytest.mark.parametrize("options", FAMILY, ids=called)
def test_every_loss_equals_the_backward_pass_and_float64(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    number = FAMILY.index(options)
    rows, name = BLOCKS[1 + number % 2], ("llama-untied", "gemma2", "qwen2")[number % 3]
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
    units, objective = pairs(), made(options)
    reference = references(units)
    scorer = Scorer(make(name))
    check_equal(scorer, pack(units, 2), objective, reference if objective.needs_reference else None)
    exact = plain.build_plain(make(name))
    lengths = torch.tensor([[len(r) for r in u.responses] for u in units], dtype=torch.float64)
    loss, _ = plain.pair_loss(options, plain_sums(exact, units), reference, lengths)
    (loss.sum() * 0.37).backward()
    assert worst(gradients(scorer.lm), gradients(exact))[0] <= 1e-5


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "phi3"])
def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, rows: int, name: str) -> None:
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
    units = pairs()
    check_equal(Scorer(make(name)), pack(units, 2), made(FAMILY[0]), references(units))


@pytest.mark.parametrize("rows", BLOCKS)
def test_single_responses(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """KTO, with its reference point known beforehand, and SFT."""
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
    scorer, units = (
        Scorer(make("llama-tied")),
        [Unit(u.row, u.prompt, u.responses[:1], bool(u.row % 3)) for u in pairs()],
    )
    batch = pack(units, 1)
    kto = KTO(0.1, 1.0, 1.3, z0=torch.tensor(0.4, dtype=torch.float64))
    check_equal(scorer, batch, kto, references(units))
    check_equal(scorer, batch, SFT(), None)


def test_an_empty_micro_batch_runs_backward_through_everything() -> None:
    scorer = Scorer(make("gemma2"))
    terms, found = forward_pass(scorer, pack([], 2), made(FAMILY[0]), torch.zeros(0, 2, dtype=torch.float64))
    assert terms.loss == 0
    assert terms.per_unit.shape == (0, len(made(FAMILY[0]).metrics))
    assert set(found) == {n for n, _ in scorer.lm.named_parameters()}
    assert all(not g.any() for g in found.values())


def test_without_gradient_nothing_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation scores alone, with the same numbers."""
    scorer, units = Scorer(make("llama-tied")), pairs()
    trained = scorer(pack(units, 2), made(FAMILY[0]), references(units))
    monkeypatch.setattr(head._Gradients, "add", None)
    with torch.no_grad():
        evaluated = scorer(pack(units, 2), made(FAMILY[0]), references(units))
    assert torch.equal(evaluated.statistics, trained.statistics)
    assert not evaluated.loss.requires_grad


@pytest.mark.parametrize(("rows", "products"), [(10**6, 3), (1, 4)])
def test_matrix_products_of_the_head(monkeypatch: pytest.MonkeyPatch, rows: int, products: int) -> None:
    """Three where the logits are at hand, four where a prompt's are more than a block."""
    torch.manual_seed(0)
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
    layer = torch.nn.Linear(32, VOCABULARY, bias=False)
    head.attach_logp_head(layer)
    hidden, target = torch.randn(40, 32, requires_grad=True), torch.randint(0, VOCABULARY, (40, 2))
    with counting(attention=False) as counter:
        value, _ = layer(hidden, target, [13, 40], lambda first, end, logps: logps.double().sum())
        value.backward()
    assert counter.get_total_flops() == products * 2 * 40 * 32 * VOCABULARY


@pytest.mark.parametrize("rows", [5, 15, 10**6])
def test_one_block_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Of one prompt after the other, of a prompt of several, and where they are made again."""
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
    made: list[weakref.ref[torch.Tensor]] = []
    logits = head._Head.logits

    def watched(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        assert not any(block() is not None for block in made)
        block = logits(self, hidden)
        made.append(weakref.ref(block))
        return block

    monkeypatch.setattr(head._Head, "logits", watched)
    layer = torch.nn.Linear(8, VOCABULARY)
    head.attach_logp_head(layer)
    hidden, target = torch.randn(40, 8, requires_grad=True), torch.randint(0, VOCABULARY, (40, 2))
    value, _ = layer(hidden, target, [13, 26, 40], lambda first, end, logps: logps.double().sum())
    value.backward()
    layer(hidden, target).sum().backward()
    assert len(made) == {5: 3 * 2 * 3 + 2 * 8, 15: 3 + 2 * 3, 10**6: 1 + 2}[rows]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("rows", [5, 10**6])
def test_bias_factor_and_cap(
    monkeypatch: pytest.MonkeyPatch, bias: bool, cap: float | None, factor: float, rows: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
    layer = torch.nn.Linear(8, VOCABULARY, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(4)
    exact = torch.nn.Linear(8, VOCABULARY, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    head.attach_logp_head(layer, head.FinalTransform(factor, cap))
    hidden, target = torch.randn(40, 8, requires_grad=True), torch.randint(0, VOCABULARY, (40, 3))
    weight, ends = torch.randn(40, 3), [4, 11, 40]

    def part(first: int, end: int, logps: torch.Tensor) -> torch.Tensor:
        begin = ends[first - 1] if first else 0
        return (logps.double() * weight[begin : ends[end - 1]]).sum()

    value, logps = layer(hidden, target, ends, part)
    (3 * value).backward()
    twin = hidden.detach().double().requires_grad_()
    logits = factor * exact(twin)
    wanted = torch.log_softmax(logits if cap is None else cap * torch.tanh(logits / cap), -1).gather(-1, target)
    (3 * (wanted * weight).sum()).backward()
    assert apart(logps.double(), wanted) <= 1e-6
    for got, want in zip([hidden, *layer.parameters()], [twin, *exact.parameters()], strict=True):
        assert (got.grad - want.grad).norm() / want.grad.norm() <= 1e-6


def test_bfloat16_is_as_near_as_the_backward_pass() -> None:
    """One rounding more, of the hidden states' gradient, where what comes in is no power of two."""
    lm = make("llama-untied", torch.bfloat16)
    exact, scorer, units = plain.build_plain(lm), Scorer(lm), pairs()
    (0.37 * plain.dpo_loss(plain_sums(exact, units), references(units), 0.05).sum()).backward()
    objective = replace(made({**FAMILY[0], "average": "sums"}), beta=0.05, label_smoothing=0.0)
    errors = [
        worst(way(scorer, pack(units, 2), objective, references(units))[1], gradients(exact))[0]
        for way in (backward_pass, forward_pass)
    ]
    print("bfloat16:", errors)
    assert errors[1] <= 1.1 * errors[0]
    assert errors[1] <= 0.05
