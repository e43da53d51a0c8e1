"""What decides the responses besides model and prompt, and one token for each row of logits.

A token is taken by the inverse of the cumulated probabilities.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from prefopt_dist.data.rendering import Template


@dataclass(frozen=True)
class Sampling:
    """What decides the responses besides model and prompt."""

    n: int
    """Responses to a prompt"""
    temperature: float
    top_p: float
    max_new_tokens: int
    """The end token included"""
    seed: int
    stop_ids: tuple[int, ...]
    """Tokens that end a response; the one that did is its last token"""


def stop_ids_of(template: Template, folder: Path) -> tuple[int, ...]:
    """The tokens that end an answer: the template's, eos, and those of the folder's generation_config.json."""
    tokenizer = template.tokenizer
    found = {tokenizer.convert_tokens_to_ids(end) for end in (*template.ends, template.untemplated_end)}
    file = folder / "generation_config.json"
    if file.is_file():
        said = json.loads(file.read_text()).get("eos_token_id")
        found |= {said} if isinstance(said, int) else set(said or ())
    return tuple(sorted(found))


def choose(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """int64 [B]: the first token whose cumulated probability exceeds u; V where the logits give no probabilities (NaN).

    logits: [B, V]; u: float64 [B] in [0, 1). The tokens are cumulated in the order of their ids, which rounding
    does not change (in the order of their probabilities two of them could change places).
    """
    probabilities = torch.softmax(logits.float() / temperature, -1).double()
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    # u · total may round up to total, beyond which there is no token.
    aim = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, aim, right=True).squeeze(-1)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The same with 0 outside the fewest most likely tokens whose probabilities reach top_p (Holtzman et al. 2020)."""
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = descending.cumsum(-1) - descending
    kept = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, order, before < top_p)
    return probabilities * kept
