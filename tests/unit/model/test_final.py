"""What families compute between their head's product and the logits: found from their own forward function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, VOCABULARY, tiny_model
from torch import nn

from prefopt_dist.errors import UserError
from prefopt_dist.model.final import final_transform
from prefopt_dist.model.head import FinalTransform, LogpHead, attach_logp_head
from prefopt_dist.model.parts import backbone, output_head

KNOWN = {
    "granite": FinalTransform(1 / 3),
    "granitemoehybrid": FinalTransform(1 / 2),
    "falcon_h1": FinalTransform(0.5),
    "cohere": FinalTransform(0.3),
    "gemma4_text": FinalTransform(1.0, 5.0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_log_probs_of_the_family_s_own_logits(family: str) -> None:
    lm = tiny_model(family)
    ids = torch.randint(1, VOCABULARY, (1, 9))
    with torch.no_grad():
        wanted = torch.log_softmax(lm(input_ids=ids, use_cache=False).logits[0].double(), -1)
    found = final_transform(lm)
    assert found == KNOWN.get(family, FinalTransform())
    attach_logp_head(output_head(lm), found)
    with torch.no_grad():
        hidden = backbone(lm)(input_ids=ids, use_cache=False).last_hidden_state[0]
        logps = output_head(lm)(hidden, torch.arange(VOCABULARY).expand(9, -1).contiguous())
    assert (logps - wanted).abs().max() < 2e-6
    assert final_transform(lm) == found, "it is found again on a head that is attached"


@pytest.mark.parametrize("family", ["cohere", "gemma4_text"])
def test_its_gradient_is_that_of_the_family_s_own_logits(family: str) -> None:
    lm = tiny_model(family)
    head, hidden = output_head(lm), 3 * torch.randn(7, lm.config.hidden_size, dtype=torch.float64)
    target, weight = torch.randint(0, VOCABULARY, (7, 2)), torch.randn(7, 2)
    transform, exact = final_transform(lm), hidden.clone().requires_grad_()
    matrix = head.weight.detach().double().requires_grad_()
    logits = transform.apply(exact @ matrix.T)
    (torch.log_softmax(logits, -1).gather(-1, target) * weight).sum().backward()
    attach_logp_head(head, transform)
    taken = hidden.float().requires_grad_()
    head.weight.grad = None
    (head(taken, target) * weight).sum().backward()
    for got, want in ((taken.grad, exact.grad), (head.weight.grad, matrix.grad)):
        assert got is not None
        assert want is not None
        assert (got - want).norm() / want.norm() < 1e-6


def test_no_weight_is_read() -> None:
    """Under ZeRO-3 a rank has only a part of each weight."""
    lm = tiny_model("granite").to("meta")
    assert final_transform(lm) == KNOWN["granite"]


def test_anything_else_is_refused_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_model("olmo3")
    original = type(lm).forward

    def squared(self: Any, **given: Any) -> Any:
        result = original(self, **given)
        result.logits = result.logits + 0.01 * result.logits**2
        return result

    monkeypatch.setattr(type(lm), "forward", squared)
    with pytest.raises(UserError, match=r"model\.name_or_path: Olmo3ForCausalLM computes something .* differ from"):
        final_transform(lm)


def test_a_bias_that_a_factor_leaves_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor on the hidden states does not reach the head's bias."""
    lm = tiny_model("granite")
    lm.set_output_embeddings(nn.Linear(lm.config.hidden_size, VOCABULARY))

    def before(self: Any, input_ids: Any, use_cache: bool, return_dict: bool) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        return _Result(self.lm_head(hidden / 2))

    monkeypatch.setattr(type(lm), "forward", before)
    with pytest.raises(UserError, match="neither a factor nor a soft-cap"):
        final_transform(lm)


class _Result:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    ("head", "said"),
    [(None, "no output head"), (nn.Sequential(nn.Linear(32, 67)), "an output head of class Sequential")],
)
def test_a_head_of_another_class_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, head: nn.Module | None, said: str
) -> None:
    lm = tiny_model("olmo3")
    monkeypatch.setattr(type(lm), "get_output_embeddings", lambda self: head)
    with pytest.raises(UserError, match=said):
        output_head(lm)


def test_an_attached_head_is_still_the_head() -> None:
    lm = tiny_model("cohere")
    attach_logp_head(output_head(lm))
    assert type(output_head(lm)) is LogpHead
