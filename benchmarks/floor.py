"""The least number of operations of a DPO step (the floor), and the shapes of the models that are measured.

Legend: N parameters of the layers' matrices, V vocabulary, d hidden, L layers, a width of all query heads,
P, C, R tokens of prompt, chosen and rejected; T = P + C + R − 2 distinct input tokens of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prefopt_dist.batching.layout import TRAINING_PASSES, Cost


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    vocabulary: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    tied: bool = False
    pairs: int = 8
    """Pairs of a step by default"""

    @property
    def attention_width(self) -> int:
        """Return a."""
        return self.heads * self.head_size

    @property
    def backbone(self) -> int:
        """Return N."""
        keys = self.key_value_heads * self.head_size
        attention = 2 * self.hidden * self.attention_width + 2 * self.hidden * keys
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def cost(self) -> Cost:
        """Return the cost as model/cost.py computes it for a model folder, without the vectors of the norms."""
        return Cost(
            per_token=2.0 * self.backbone,
            per_attended=4.0 * self.layers * self.attention_width,
            per_scored=2.0 * self.vocabulary * self.hidden,
        )

    @property
    def head_share(self) -> float:
        """Return V·d/N; it is 0.075 for an 8B Llama 3.1."""
        return self.vocabulary * self.hidden / self.backbone


SHAPES = {
    # The head has the same share as in an 8B model, and attention a few per cent. With a small hidden size and a large
    # vocabulary the head would dominate, so either the vocabulary is small too, or the layers are wide.
    "small": Shape(1408, 512, 1792, 3, 4, 2, 64),
    "small-32k": Shape(32_000, 128, 8192, 17, 2, 1, 64, pairs=2),
    "small-128k": Shape(128_256, 128, 16_384, 34, 2, 1, 64, pairs=2),
    "tiny": Shape(512, 64, 224, 2, 2, 1, 32, pairs=4),
    "1b": Shape(128_256, 2048, 8192, 16, 32, 8, 64, tied=True),
    "8b": Shape(128_256, 4096, 14_336, 32, 32, 8, 128),
}


def forward_flop(shape: Shape, prompt: int, chosen: int, rejected: int) -> float:
    """Return the FLOP of one pair, every distinct token through the layers once: 2N·T + attention + 2Vd·(C + R)."""
    return shape.cost.of_lengths(prompt, (chosen, rejected), prompt + chosen + rejected - 2)


def first_pass_flop(shape: Shape, lengths: Iterable[tuple[int, int, int]]) -> float:
    """Return the FLOP of scoring these pairs once."""
    return sum(forward_flop(shape, *pair) for pair in lengths)


def step_flop(shape: Shape, lengths: Iterable[tuple[int, int, int]]) -> float:
    """Return the FLOP of a training step on these pairs: forward, and twice as much backward."""
    return TRAINING_PASSES * first_pass_flop(shape, lengths)


def distinct_tokens(lengths: Iterable[tuple[int, int, int]]) -> int:
    """Return Σ T, the distinct input tokens of these pairs."""
    return sum(sum(pair) - 2 for pair in lengths)
