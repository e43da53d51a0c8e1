"""Operations that attention dispatches: python -m benchmarks.launches [--mix ultrafeedback-like] [--pairs 16].

It runs the decoder of a Gemma 2 of three layers forward and backward on a packed row, on torch's meta device, which
has no numbers and takes each operation as a GPU would. An operation that makes no view is a kernel launch on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.pairs import MIXES, draw_pairs
from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model import attention

LAYERS = 3


class Dispatches(TorchDispatchMode):
    """Count the operations within; `launches` are those that make no view and do more than allocate memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.launches = 0
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and run it."""
        self.operations += 1
        views = func.is_view or str(func).split(".")[1] in (
            "_unsafe_view",
            "detach",
            "empty",
            "new_empty",
            "empty_like",
        )
        if not views:
            self.launches += 1
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def gemma2(*, cap: float | None, layers: int = LAYERS, **changes: Any) -> PreTrainedConfig:
    """Return the configuration of a Gemma 2 with the heads of the 2B model and a small width."""
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": cap,
    }
    return AutoConfig.for_model("gemma2", **sizes | changes)


def packed(mix: str, pairs: int, seed: int = 0) -> MicroBatch:
    """Pack pairs of a mix's lengths into one row."""
    drawn = draw_pairs(MIXES[mix], pairs, 512, seed)
    units = [Unit(i, *_arrays(p, c, r)) for i, (p, c, r) in enumerate(drawn)]
    return pack(units, 2)


def _arrays(prompt: list[int], chosen: list[int], rejected: list[int]) -> tuple[Any, tuple[Any, Any]]:
    p, c, r = (np.array(x, dtype=np.int32) for x in (prompt, chosen, rejected))
    return p, (c, r)


def count(config: PreTrainedConfig, batch: MicroBatch) -> Dispatches:
    """Count the operations of the decoder's forward and backward pass."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME).train()
    row = batch.to(torch.device("meta"))
    with Dispatches() as found:
        lm.base_model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            segments=row.segments,
            gathered=row.gathered,
            use_cache=False,
        ).last_hidden_state.sum().backward()
    return found


def main() -> None:
    """Print the counts with a cap and without one, where the variable-length kernel computes all segments."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mix", choices=MIXES, default="ultrafeedback-like")
    options.add_argument("--pairs", type=int, default=16)
    options.add_argument("--names", action="store_true", help="the operations by name too")
    asked = options.parse_args()
    batch = packed(asked.mix, asked.pairs)
    print(f"{asked.pairs} pairs, {asked.mix}: {batch.tokens:,} tokens, {len(batch.segments)} segments, {LAYERS} layers")
    for what, cap in (("soft-capped", 50.0), ("variable-length kernel", None)):
        if cap is None:
            attention.varlen_supported = lambda *_: True  # type: ignore[assignment]
        found = count(gemma2(cap=cap), batch)
        print(f"{what:24s} {found.operations:7,} operations, {found.launches:7,} launches")
        if asked.names:
            for name, times in found.names.most_common(25):
                print(f"    {times:6,} {name}")


if __name__ == "__main__":
    main()
