"""Beginnings of responses: their log-probs and gradients without a token more, and LD-DPO on them."""

from dataclasses import replace
from typing import Any

import numpy as np
import plain
import pytest
import torch
from loss_family import made
from models_for_tests import VOCABULARY, make

from prefopt_dist.batching.micro_batch import PATHS, ComputePath, in_rectangles
from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model.load import own_attention
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import LengthDesensitised, Sequences
from prefopt_dist.training.diagnosis import saturated

LENGTHS = ((3, 7), (6, 2), (4, 4), (1, 5))


def pairs(prefix: bool) -> list[Unit]:
    """Two pairs answer the first prompt, and share a response whose beginnings have two lengths."""
    draw = np.random.RandomState(3)
    prompts = [draw.randint(0, VOCABULARY, size=5).astype(np.int32) for _ in range(3)]
    found = []
    for i, lengths in enumerate(LENGTHS):
        responses = tuple(draw.randint(0, VOCABULARY, size=n).astype(np.int32) for n in lengths)
        if i == 3:
            responses = (responses[0], found[0].responses[1])
        n = min(map(len, responses)) if prefix else None
        found.append(Unit(i, prompts[i % 3], responses, prefix=n))
    return found


def exact_sums(model: Any, units: list[Unit]) -> torch.Tensor:
    return torch.stack(
        [
            torch.stack([plain.sequence_logp(model, u.prompt, r[:n]) for n in (None, u.prefix) for r in u.responses])
            for u in units
        ]
    )


@pytest.mark.parametrize("path", PATHS)
def test_beginnings_equal_sequences_of_their_own(path: ComputePath) -> None:
    model = make("llama-tied")
    if in_rectangles(path):
        model.set_attn_implementation(own_attention(model.config))
    scorer, units = Scorer(model, path), pairs(prefix=True)
    batch, without = pack(units, 4, path), pack(pairs(prefix=False), 2, path)
    assert batch.tokens == without.tokens
    assert torch.equal(batch.source, without.source)
    found = scorer.sequence_sums(batch)[batch.units]
    exact = exact_sums(plain.build_plain(make("llama-tied")), units)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    assert batch.counts[batch.units].tolist() == [[*map(len, u.responses), u.prefix, u.prefix] for u in units]
    assert pack([], 4, path).units.shape == (0, 4)


@pytest.mark.parametrize("options", [{}, {"average": "tokens", "beta": 5.0, "sft_weight": 0.3}])
def test_ld_dpo_equals_float64(options: dict[str, Any]) -> None:
    """Through the head's loss; a token beyond the shorter length counts α, in policy and reference."""
    alpha = 0.3
    objective = made({"name": "dpo", "ld_alpha": alpha, **options})
    scorer, units = Scorer(make("llama-tied")), pairs(prefix=True)
    exact_model, start = plain.build_plain(make("llama-tied")), plain.build_plain(make("llama-untied"))
    with torch.no_grad():
        reference = exact_sums(start, units)
    terms = scorer(pack(units, 4), objective, reference)
    terms.loss.backward()

    def desensitised(model: Any) -> torch.Tensor:
        rows = []
        for u in units:
            of_pair = [plain.token_log_probs(model, u.prompt, r) for r in u.responses]
            n = min(map(len, of_pair))
            rows.append(torch.stack([(t * torch.where(torch.arange(len(t)) < n, 1.0, alpha)).sum() for t in of_pair]))
        return torch.stack(rows)

    live = desensitised(exact_model)
    lengths = torch.tensor([[len(r) for r in u.responses] for u in units], dtype=torch.float64)
    given = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "average": "sums"} | options | {"sft_weight": 0.0}
    with torch.no_grad():
        start_sums = desensitised(start)
    loss, _ = plain.pair_loss(given, live, start_sums, lengths)
    if options:
        whole = torch.stack([plain.token_log_probs(exact_model, u.prompt, u.responses[0]).mean() for u in units])
        loss = loss - options["sft_weight"] * whole
    loss.sum().backward()
    assert terms.loss.item() == pytest.approx(loss.sum().item(), rel=1e-5)
    exact = {name: p.grad for name, p in exact_model.named_parameters()}
    for name, p in scorer.lm.named_parameters():
        assert (p.grad.double() - exact[name]).norm() <= 2e-5 * exact[name].norm(), name
    assert terms.sums.shape == (4, 4)


def test_ld_dpo_by_hand() -> None:
    """α = 0 leaves the beginnings alone; the closed form stays; a part of a mix takes its own sequences."""
    objective = made({"name": "dpo", "beta": 1.0, "ld_alpha": 0.0})
    assert isinstance(objective, LengthDesensitised)
    sums = torch.tensor([[-3.0, -9.0, -3.0, -5.0]], dtype=torch.float64)
    reference = torch.tensor([[-4.0, -8.0, -4.0, -4.5]], dtype=torch.float64)
    units = Sequences(sums, torch.tensor([[2, 5, 2, 2]]), reference)
    shown = dict(zip(objective.metrics, objective(units).per_unit[0].tolist(), strict=True))
    assert shown["rewards/margins"] == pytest.approx(1.0 + 0.5)
    assert shown["logps/rejected"] == -5
    assert objective.start_loss == made({"name": "dpo"}).start_loss
    assert not saturated(objective, units).any()
    parts = {"dpo": {"weight": 1.0, "beta": 1.0, "ld_alpha": 0.0}, "ipo": {"weight": 1.0, "average": "sums"}}
    mix = made({"name": "mix", "of": parts})
    assert mix.responses == 4
    shown = dict(zip(mix.metrics, mix(units).per_unit[0].tolist(), strict=True))
    alone = made({"name": "ipo", "average": "sums"})(
        replace(units, sums=sums[:, :2], counts=units.counts[:, :2], reference=reference[:, :2])
    )
    assert shown["ipo_loss"] == alone.per_unit[0, 0].item()


def test_ld_alpha_1_is_dpo() -> None:
    assert made({"name": "dpo", "ld_alpha": 1.0}) == made({"name": "dpo"})
