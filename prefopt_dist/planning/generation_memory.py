"""Memory of one rank while it answers prompts with a whole copy of the model, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt_dist.planning.cpu_memory import repeated_kv, resident
from prefopt_dist.planning.phases import MemoryPart, Phase, Placement
from prefopt_dist.planning.sizes import ModelSizes

GENERATION = "generation"
"""Name of the phase in which a rank answers prompts, without ZeRO-3."""
SAMPLING_BYTES, TOP_P_BYTES = 16, 40
"""Bytes per logit while a token is sampled (rollouts/sampling.py): probabilities and their cumulative sums in float64;
with top_p below 1 also the sorted probabilities and their order."""


@dataclass(frozen=True)
class GenerationSettings:
    """The settings by which prompts are answered."""

    batch_tokens: int
    """Value of `generate.batch_tokens`"""
    prompt_tokens: int
    """Tokens of the longest prompt"""
    new_tokens: int
    """Value of `generate.max_new_tokens`"""
    n: int
    """Fewest answers to a prompt, which decides how many different prompts a batch has"""
    uses_top_p: bool
    """Whether top_p is below 1"""

    def batch(self, prompt: int) -> int:
        """Return the number of sequences in a batch of prompts of `prompt` tokens."""
        return max(1, self.batch_tokens // (prompt + self.new_tokens))


def generation_phase(sizes: ModelSizes, place: Placement, asked: GenerationSettings) -> Phase:
    """Return the memory while a whole copy of the model answers a batch (rollouts/transformers_engine.py).

    Every rank has a copy of its own, so more ranks do not reduce it.
    """
    memory = sizes.activations
    whole = sizes.whole_bytes
    tokens = max(asked.batch_tokens, asked.prompt_tokens + asked.new_tokens)
    sequences = asked.batch(asked.prompt_tokens)
    # The first and the last prompt of a batch may have only some of their answers in it.
    prompts = min(sequences, (sequences + asked.n - 2) // asked.n + 1)
    layer = asked.prompt_tokens * prompts * (memory.per_token_layer + memory.per_token_ends + repeated_kv(sizes, place))
    logit = sizes.dtype_bytes + (TOP_P_BYTES if asked.uses_top_p else SAMPLING_BYTES)
    return Phase(
        GENERATION,
        (
            MemoryPart("parameters, whole", whole, "s·N"),
            *([MemoryPart("parameters while loading", whole, "s·N", on_host=True)] if place.is_gpu else []),
            MemoryPart(
                "keys and values",
                resident(memory.layers * sizes.cached_kv_bytes * tokens, place),
                "s·2·layers·kv·head_dim·tokens",
            ),
            MemoryPart(
                "one layer's, while copied", resident(sizes.cached_kv_bytes * tokens, place), "s·2·kv·head_dim·tokens"
            ),
            MemoryPart("prompts, one layer", resident(layer, place), "tokens × bytes a layer"),
            # A batch of the shortest prompts has the most sequences.
            MemoryPart("logits and sampling", logit * asked.batch(1) * memory.vocabulary, f"{logit}·sequences·V"),
        ),
    )
