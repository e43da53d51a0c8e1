"""The randomness of sampling, by a counter: a draw depends on what it is for, not on what was drawn before.

So neither the number of ranks, nor which prompts share a batch, nor a restart changes a response.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray


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
