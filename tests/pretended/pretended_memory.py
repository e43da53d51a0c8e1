"""Bytes that a forward pass keeps on the pretended device, and peaks: pretended_memory.py OUT.json.

A model of four layers in bfloat16, by the flash kernel and by blocks of scores, with five shapes of batches.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretended

TOKENS = 1536
"""About as many tokens has each batch."""


def shapes(pairs_of: Any) -> dict[str, list[Any]]:
    """Five shapes of batches; `pairs_of(prompt, response, pairs)` makes pairs of one prompt."""
    return {
        "many short pairs": [u for _ in range(16) for u in pairs_of(40, 30, 1)],
        "24 pairs of one prompt": pairs_of(200, 28, 24),
        "one long pair": pairs_of(512, 512, 1),
        "long prompt, short responses": pairs_of(1400, 34, 2),
        "mixed": [*pairs_of(300, 20, 4), *pairs_of(60, 180, 2), *pairs_of(25, 40, 3)],
    }


def main() -> None:
    device = pretended.install()
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from prefopt_dist.batching.packing import pack
    from prefopt_dist.data.unit import Unit
    from prefopt_dist.model import activation_checkpointing, attention
    from prefopt_dist.model.cost import activation_memory
    from prefopt_dist.model.scorer import Scorer
    from prefopt_dist.objectives import DPO

    draw = np.random.default_rng(0)

    def tokens(n: int) -> Any:
        return draw.integers(3, 500, size=n, dtype=np.int32)

    def pairs_of(prompt: int, response: int, pairs: int) -> list[Unit]:
        ids = tokens(prompt)
        return [Unit(i, ids, (tokens(response), tokens(response))) for i in range(pairs)]

    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
    }
    batches = {name: pack(units, 2) for name, units in shapes(pairs_of).items()}
    records = []
    for family, more in (("llama", {}), ("gemma2", {"sliding_window": 256})):
        config = AutoConfig.for_model(family, **sizes | more)
        for checkpointed in (0, 4):
            torch.manual_seed(0)
            lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.bfloat16)
            scorer = Scorer(lm.cuda()).train()
            activation_checkpointing.apply(lm, checkpointed)
            for parameter in scorer.parameters():
                parameter.grad = torch.zeros_like(parameter)  # the plan has them by themselves
            head_gradient = 4 * config.vocab_size * config.hidden_size
            for name, packed in batches.items():
                micro = packed.to(torch.device("cuda", 0))
                reference = torch.zeros(len(micro.rows), 2, dtype=torch.float64, device="cuda")
                counted = activation_memory(config, torch.bfloat16)
                memory = replace(counted, keys_per_token=len(micro.gathered.keys) / micro.tokens, on_gpu=True)
                again = int(micro.tokens * memory.per_token_whole_layer) if checkpointed else 0
                estimate = memory.bytes(micro.tokens, checkpointed) - memory.block(micro.tokens)
                # The plan takes every token for one whose state reaches the head, with three rows of each: the state,
                # its gradient, and the same gradient among those of all tokens, which the backward pass makes.
                of_head = 2 * config.hidden_size * (3 * micro.tokens - 2 * len(micro.source))
                before = device.live()
                terms = scorer(micro, DPO(0.1), reference)
                kept = device.live() - before - head_gradient
                device.reset_peak()
                terms.loss.backward()
                peak = device.peak() - before - head_gradient
                del terms
                gc.collect()
                records.append(
                    {
                        "family": family,
                        "checkpointed": checkpointed,
                        "batch": name,
                        "tokens": micro.tokens,
                        "keys": len(micro.gathered.keys),
                        "kept": kept,
                        "estimated": estimate - again - of_head,
                        "peak_of_backward": peak,
                        "estimated_peak": estimate + memory.attention_backward(micro.tokens),
                    }
                )
                print(json.dumps(records[-1]), flush=True)
    Path(sys.argv[1]).write_text(json.dumps(records))


if __name__ == "__main__":
    main()
