"""WPO: log Σ p² from the head, and the weights of pairs, which have no gradient."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from loss_family import made
from models_for_tests import VOCABULARY, make, pairs, references

from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model import head
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import WPO, Sequences

BLOCKS = [1, 7, 10_000]


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_the_head_returns_log_squares(monkeypatch: pytest.MonkeyPatch, rows: int, name: str) -> None:
    """Whatever the blocks, with and without a loss; gemma2's logits are capped."""
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
    model = make(name)
    scorer = Scorer(model)
    batch = pack(pairs(), 2)
    states = scorer._states(batch).detach().requires_grad_()
    output = model.get_output_embeddings()
    with torch.no_grad():
        product = torch.nn.functional.linear(states, output.weight).double()
        cap = output.transform.cap
        exact = torch.softmax(product if cap is None else cap * torch.tanh(product / cap), -1).square().sum(-1).log()
    found = torch.empty(len(states))
    output(states, batch.target, squares=found)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    given = []

    def loss(first: int, end: int, logps: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        given.append(squares)
        return logps.double().sum()

    again = torch.empty(len(states))
    output(states, batch.target, [prompt.states for prompt in batch.prompts], loss, again)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat(given), again)


def weights(model: Any, units: list[Unit]) -> torch.Tensor:
    """w_c w_r of each pair, token by token in float64."""
    found = []
    for unit in units:
        product = 1.0
        for response in unit.responses:
            ids = torch.tensor([[*map(int, unit.prompt), *map(int, response)]])
            p = torch.softmax(model(input_ids=ids, use_cache=False).logits[0], -1)[len(unit.prompt) - 1 : -1]
            own = p.gather(-1, ids[0, len(unit.prompt) :, None])[:, 0]
            product = product * torch.exp((own.log() - p.square().sum(-1).log()).mean())
        found.append(product)
    return torch.stack(found).detach()


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("options", [{}, {"average": "tokens", "beta": 5.0, "sft_weight": 0.3}])
def test_wpo_equals_float64(monkeypatch: pytest.MonkeyPatch, rows: int, options: dict[str, Any]) -> None:
    """Loss, gradient without that of the weights, metrics; the SFT term is not weighted; evaluation is the same."""
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
    objective = made({"name": "dpo", "wpo": True, **options})
    assert objective.start_loss is None
    scorer, units = Scorer(make("llama-untied")), pairs()
    reference, batch = references(units), pack(units, 2)
    terms = scorer(batch, objective, reference)
    terms.loss.backward()
    exact = plain.build_plain(make("llama-untied"))
    live = torch.stack([torch.stack(plain.pair_log_probs(exact, u.prompt, *u.responses)) for u in units])
    lengths = torch.tensor([[len(r) for r in u.responses] for u in units], dtype=torch.float64)
    given = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "average": "sums"} | options | {"sft_weight": 0.0}
    loss, reward = plain.pair_loss(given, live, reference, lengths)
    weight = weights(exact, units)
    loss = weight * loss - options.get("sft_weight", 0.0) * live[:, 0] / lengths[:, 0]
    loss.sum().backward()
    assert terms.loss.item() == pytest.approx(loss.sum().item(), rel=1e-5)
    expected = {name: p.grad for name, p in exact.named_parameters()}
    for name, p in scorer.lm.named_parameters():
        assert (p.grad.double() - expected[name]).norm() <= 2e-5 * expected[name].norm(), name
    shown = dict(zip(objective.metrics, terms.per_unit.unbind(1), strict=True))
    torch.testing.assert_close(shown["wpo_weight"], weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(shown["loss"], loss.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(shown["rewards/chosen"], reward[:, 0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.statistics, terms.per_unit.sum(0))
    with torch.no_grad():
        torch.testing.assert_close(scorer(batch, objective, reference).per_unit, terms.per_unit, rtol=1e-5, atol=1e-6)


def test_weights_of_rows_stand_beside_it() -> None:
    """The sum takes both; the metrics are weighted by the rows' alone."""
    objective = made({"name": "dpo", "wpo": True})
    assert isinstance(objective, WPO)
    sums = torch.tensor([[-3.0, -5.0], [-2.0, -9.0]], dtype=torch.float64)
    relative = torch.tensor([[0.1, -0.4], [-0.3, 0.2]], dtype=torch.float64)
    of_rows = torch.tensor([0.5, 1.5], dtype=torch.float64)
    units = Sequences(sums, torch.tensor([[2, 3], [4, 5]]), sums - 0.5 * sums, weight=of_rows, relative=relative)
    plain_loss = made({"name": "dpo"})(units).per_unit[:, 0]
    found = objective(units)
    weight = torch.exp(relative.sum(1))
    assert found.loss.item() == pytest.approx((of_rows * weight * plain_loss).sum().item(), rel=1e-12)
    assert found.statistics[0].item() == pytest.approx(found.loss.item(), rel=1e-12)
    margin = objective.metrics.index("rewards/margins")
    assert found.statistics[margin].item() == pytest.approx((of_rows * found.per_unit[:, margin]).sum().item())
    mix = made({"name": "mix", "of": {"dpo": {"weight": 1.0, "wpo": True}, "ipo": {"weight": 0.1}}})
    assert mix.needs_squares
    shown = dict(zip(mix.metrics, mix(units).per_unit.unbind(1), strict=True))
    torch.testing.assert_close(shown["dpo_loss"], weight * plain_loss)
    assert made({"name": "dpo"}).needs_squares is False
