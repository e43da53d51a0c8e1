"""The parts of a causal language model that this package calls by itself, found in any family."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from prefopt_dist.errors import UserError
from prefopt_dist.model.head import LogpHead


def backbone(lm: PreTrainedModel) -> nn.Module:
    """Return the module that turns token ids into the last hidden states.

    Raises:
        UserError: the family has no such module of its own.
    """
    named: nn.Module = lm.base_model
    if named is not lm:
        return named
    # A few families give base_model_prefix another name than the module has.
    untyped: Any = lm
    embedding: nn.Module = untyped.get_input_embeddings()
    for child in lm.children():
        if child is not embedding and embedding in child.modules():
            return child
    raise UserError(
        f"model.name_or_path: {type(lm).__name__} has no module before its output head that can be called alone. "
        "Give a model of another family."
    )


def output_head(lm: PreTrainedModel) -> nn.Linear:
    """Return the output head, a plain linear layer, or what `attach_logp_head` made of it.

    Raises:
        UserError: the family has none, or one that computes something else.
    """
    head = lm.get_output_embeddings()
    if type(head) is nn.Linear or type(head) is LogpHead:
        return head
    kind = "no output head" if head is None else f"an output head of class {type(head).__name__}"
    raise UserError(
        f"model.name_or_path: {type(lm).__name__} has {kind}; log-probs are computed for plain linear heads. "
        "Give a model of another family."
    )


def name_of(lm: nn.Module, part: nn.Module) -> str:
    """Return the name of a module inside the model."""
    names: list[str] = [name for name, module in lm.named_modules(remove_duplicate=False) if module is part]
    return names[0]


def decoder_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers in their order; none where the family keeps them in another way than a list."""
    number = getattr(lm.config, "num_hidden_layers", None)
    lists = [m for m in backbone(lm).modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    # Beside the layers there may be lists of norms or projections of the same length, which have fewer parts.
    found = max(lists, key=lambda m: sum(1 for _ in m.modules()), default=None)
    return [] if found is None else list(found)
