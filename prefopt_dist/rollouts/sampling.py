"""Sampling: its settings, the choice of a token, reproducible randomness, what every engine can do."""

from __future__ import annotations

import gc
import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.data.rendering import Template
from prefopt_dist.rollouts.prompts import Prompt

Ids = list[int]


class Engine(Protocol):
    """A whole copy of the model on this rank; or, where that has no room, all ranks' one model (lockstep)."""

    lockstep: bool
    """Every rank must sample a shard at the same time, or `meet` the others who do."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Ids]]:
        """For each prompt its n responses: token ids, with the stop token where one was reached.

        A response depends on the model, its prompt, its number and `sampling` alone, up to rounding.
        """
        ...

    def meet(self) -> None:
        """All ranks, each with its shard done or without one: compute along until all are done."""
        ...

    def close(self) -> None:
        """Gives the memory back."""
        ...


def uniforms(seed: int, prompt: bytes, sample: int, n: int, what: str = "tokens") -> NDArray[np.float64]:
    """[n] numbers in [0, 1) for response `sample` to the prompt; entry t is for its token t, whatever n is.

    prompt: a digest of its ids; what: parts streams of different use.
    """
    content = what.encode() + b"\0" + struct.pack("<QQ", seed, sample) + prompt
    key = hashlib.blake2b(content, digest_size=16).digest()
    # Raw words of Philox are fixed by its paper (Salmon et al. 2011); numpy's own floats might change some day.
    words = np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(n)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_of_model(seed: int, key: str) -> int:
    """A seed in [0, 2**64) for the answers of the weights that the key names.

    Models that are compared would otherwise draw by common random numbers: two that are nearly alike would give the
    same answers and tie, and neither a win rate nor its interval would be that of independent answers.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "little")


def padded(
    lines: Sequence[Sequence[int]], pad: int, side: Literal["left", "right"], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (1 where there is a token), both int64 [lines, longest], with `pad` on that side."""
    longest = max(map(len, lines))
    ids = torch.full((len(lines), longest), pad)
    mask = torch.zeros_like(ids)
    for row, line in enumerate(lines):
        here = slice(longest - len(line), None) if side == "left" else slice(len(line))
        ids[row, here] = torch.tensor(line)
        mask[row, here] = 1
    return ids.to(device), mask.to(device)


def give_back(device: torch.device) -> None:
    """The memory of a model that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
