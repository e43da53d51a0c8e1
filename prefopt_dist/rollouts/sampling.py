"""Sampling: its settings, the choice of a token, reproducible randomness, and the interface of the engines."""

from __future__ import annotations

import gc
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.data.template import Template
from prefopt_dist.model.folder import read_generation_config
from prefopt_dist.rollouts.prompts import Prompt

Ids = list[int]


@dataclass(frozen=True)
class TextResponse:
    """A sampled response whose token ids are not known, since a server gave its text alone."""

    text: str
    """Text without the stop token"""
    ended: bool
    """Whether it ended with a stop token, by the server's finish reason"""


Response = Ids | TextResponse
"""A sampled response: its token ids, the stop token included where one was reached, or its text"""


class Engine(Protocol):
    """A model that samples: an unsharded copy on each rank, or one model sharded over all ranks (lockstep)."""

    lockstep: bool
    """Whether sampling is collective: while one rank samples, each other rank must sample too or call `meet`."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Ids]]:
        """Sample n responses to each prompt: token ids, the stop token included where one was reached.

        A response depends only on the model, its prompt, its number and `sampling`, up to rounding.
        """
        ...

    def meet(self) -> None:
        """Take part in the other ranks' passes until all ranks have sampled their shards (all ranks call it)."""
        ...

    def close(self) -> None:
        """Release the memory that the engine holds."""
        ...


def uniforms(seed: int, prompt: bytes, sample: int, n: int, what: str = "tokens") -> NDArray[np.float64]:
    """Return uniform random numbers in [0, 1) for one response to a prompt: float64 [n].

    Entry t is for the response's token t and does not depend on n.

    Args:
        seed: of the run or the model.
        prompt: digest of the prompt's ids.
        sample: number of the response.
        n: how many numbers.
        what: name of the stream; different uses have different streams.
    """
    content = what.encode() + b"\0" + struct.pack("<QQ", seed, sample) + prompt
    key = hashlib.blake2b(content, digest_size=16).digest()
    # Philox's raw words are fixed by its paper (Salmon et al. 2011), while numpy may change how it makes floats.
    words = np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(n)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_of_model(seed: int, key: str) -> int:
    """Return a seed in [0, 2**64) for the answers of the model whose weights the key names.

    With one seed for all, compared models would sample with common random numbers: two similar models would give the
    same answers and tie, and the win rate and its interval would not be those of independent answers.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "little")


def pad_lines(
    lines: Sequence[Sequence[int]], pad: int, side: Literal["left", "right"], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded ids and their mask (1 at a token, 0 at padding), both int64 [lines, longest].

    Args:
        lines: token ids.
        pad: id of the padding token.
        side: where the padding is added.
        device: of the returned tensors.
    """
    longest = max(map(len, lines))
    ids = torch.full((len(lines), longest), pad)
    mask = torch.zeros_like(ids)
    for row, line in enumerate(lines):
        here = slice(longest - len(line), None) if side == "left" else slice(len(line))
        ids[row, here] = torch.tensor(line)
        mask[row, here] = 1
    return ids.to(device), mask.to(device)


def free_memory(device: torch.device) -> None:
    """Free the memory of a model to which no reference is left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Sampling:
    """The settings that determine the responses, together with model and prompt."""

    n: int
    """Number of responses to a prompt"""
    temperature: float
    top_p: float
    max_new_tokens: int
    """Most tokens of a response, the end token included"""
    seed: int
    stop_ids: tuple[int, ...]
    """Ids of the tokens that end a response; a response that has ended includes its stop token as the last one"""


def stop_ids_of(template: Template, folder: Path, key: str) -> tuple[int, ...]:
    """Return the ids that end an answer: the template's, eos, and those of the folder's generation_config.json.

    Args:
        template: of the prompts.
        folder: of the model.
        key: the dotted key that names the folder.

    Raises:
        UserError: the file cannot be read.
    """
    tokenizer = template.tokenizer
    found = {tokenizer.convert_tokens_to_ids(end) for end in (*template.end_tokens, template.plain_end_token)}
    generation = read_generation_config(folder, key)
    if generation is not None:
        eos = generation.eos_token_id
        found |= {eos} if isinstance(eos, int) else set(eos or ())
    return tuple(sorted(found))


def choose_tokens(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Choose a token for each row by inverse transform sampling: the first whose cumulative probability exceeds u.

    Probabilities are summed in the order of the token ids. Rounding cannot change that order, as it could change the
    order of the probabilities.

    Args:
        logits: [B, V].
        u: float64 [B] in [0, 1).
        temperature: divides the logits.
        top_p: share of the probability that nucleus sampling keeps.

    Returns:
        int64 [B], the ids; V where the logits are NaN and give no probabilities.
    """
    probabilities = torch.softmax(logits.float() / temperature, -1).double()
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    cumulative = _cumulative(probabilities)
    total = cumulative[:, -1:]
    # u · total may round up to total, which would choose a token beyond the last one.
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _cumulative(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the cumulative sums of float64 [B, V]; under `train.deterministic` on CUDA in whole units.

    torch has no deterministic cumulative sum of floating-point numbers on CUDA, and raises there.
    """
    if probabilities.is_cuda and torch.are_deterministic_algorithms_enabled():
        return cumulative_in_units(probabilities)
    return probabilities.cumsum(-1)


def cumulative_in_units(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the cumulative sums of float64 [B, V] in units of 2⁻⁶²: whole numbers, whose sums have no order.

    The entries are in [0, 1] and a line sums to 1 within float32's rounding, so that no sum exceeds 2⁶³.
    """
    units = (probabilities * 2.0**62).long().cumsum(-1).double()
    return units * 2.0**-62 + 0.0 * probabilities.sum(-1, keepdim=True)  # the last term is NaN where a line is


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the probabilities with 0 outside the nucleus (Holtzman et al. 2020).

    The nucleus is the smallest set of most likely tokens whose probabilities sum to at least top_p.
    """
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = _cumulative(descending) - descending
    kept = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, order, before < top_p)
    return probabilities * kept
