"""A trial of sampling: whether a family's cache and padding give the answers that each sequence alone would have.

Some families keep no state in the cache that they are given, or do not leave out the padding before a prompt. Their
answers would be those of another text, without an error. So a small copy of the model's shape samples a few answers as
the job does, in a batch, and each token is compared with that of the sequence alone.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from prefopt_dist.model.load import own_attention, without_dropout
from prefopt_dist.model.proof.cut import CannotCut, cuts, text_of
from prefopt_dist.model.proof.weights import randomise
from prefopt_dist.monitoring.console import say
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Sampling, choose_tokens, uniforms
from prefopt_dist.rollouts.transformers_engine import TransformersEngine

MOST_BYTES = 32 * 2**20
"""Largest size of the weights: a trial is of the family's code, which widths do not change."""
MOST_CUTS = 4
LENGTHS = (3, 14, 9)
"""Tokens of the prompts."""
SAMPLING = Sampling(n=2, temperature=1.0, top_p=1.0, max_new_tokens=8, seed=0, stop_ids=())
_found: dict[str, str] = {}
"""What came of earlier trials of this process, by the configuration."""


def fault_of_sampling(config: PreTrainedConfig, max_length: int | None = None) -> str:
    """Return why answers that the job samples would not be the model's own; empty where they are.

    It is also empty where no copy can be computed. The result is kept in memory.

    Args:
        config: of a causal language model.
        max_length: tokens of the longest prompt with its answer; None where unknown, so that it may be any.
    """
    config = without_dropout(config)
    described = json.dumps([type(config).__name__, config.to_dict(), max_length], sort_keys=True, default=str)
    if described not in _found:
        _found[described] = _fault(config, max_length)
    return _found[described]


def _fault(config: PreTrainedConfig, max_length: int | None) -> str:
    with torch.random.fork_rng([]):  # the run's own random numbers do not depend on the trial
        try:
            for cut in islice(cuts(config, max_length, MOST_BYTES), MOST_CUTS):
                try:
                    model, prompts, expected = _alone(cut.config)
                except Exception:  # a cut that the family does not compute; the next has other widths
                    continue
                return _compared(model, prompts, expected)
            why = "the family computes none of its cuts"
        except CannotCut as error:
            why = str(error)
    say(f"answers: batches with a cache could not be tried on a small copy of the model ({why}); they are not checked")
    return ""


def _alone(config: PreTrainedConfig) -> tuple[Any, list[Prompt], list[list[list[int]]]]:
    """Return a random model, prompts, and each answer by itself: no padding, no cache, all tokens again for each."""
    model: Any = AutoModelForCausalLM.from_config(
        type(config).from_dict(config.to_dict()), dtype=torch.float32, attn_implementation=own_attention(config)
    ).eval()
    randomise(model)
    draw = np.random.default_rng(0)
    prompts = [
        Prompt(i, f"prompt {i}", f"prompt {i}", None, {}, draw.integers(8, config.vocab_size, n).tolist())
        for i, n in enumerate(LENGTHS)
    ]
    return model, prompts, [[_answer(model, p, k) for k in range(SAMPLING.n)] for p in prompts]


@torch.no_grad()
def _answer(model: Any, prompt: Prompt, number: int) -> list[int]:
    ids = list(prompt.ids)
    u = torch.from_numpy(uniforms(SAMPLING.seed, prompt.key, number, SAMPLING.max_new_tokens))
    for t in range(SAMPLING.max_new_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(int(choose_tokens(logits, u[t : t + 1], SAMPLING.temperature, SAMPLING.top_p)))
    return ids[len(prompt.ids) :]


def _compared(model: Any, prompts: list[Prompt], expected: list[list[list[int]]]) -> str:
    engine = TransformersEngine(model, "a small copy of the model", batch_tokens=10_000)
    try:
        found = engine.sample(prompts, SAMPLING)
    except Exception as e:  # a family that does not take the cache
        return f"{model.config.model_type} cannot be sampled from in batches with a cache ({text_of(e)})"
    pairs = [(f, e) for of, wanted in zip(found, expected, strict=True) for f, e in zip(of, wanted, strict=True)]
    differing = sum(f != e for f, e in pairs)
    if not differing:
        return ""
    return (
        f"{model.config.model_type} computes other answers in batches with a cache than each by itself ({differing} of "
        f"{len(pairs)} of a small copy differ)"
    )
