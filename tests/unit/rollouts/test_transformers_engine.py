"""The engine: answers sampled in batches with a cache are those of each sequence alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worlds
from prompts_and_answers import CPU, FLOAT32, prompt
from transformers import AutoModelForCausalLM

from prefopt_dist.errors import UserError
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Sampling, choose_tokens, pad_lines, uniforms
from prefopt_dist.rollouts.transformers_engine import TransformersEngine, batches, load_for_sampling

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": 6},
    "qwen3": {},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


QUICK = ("llama", "gemma2", "gemma3_text", "mistral")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    worlds.write_model(folder, seed=1, scale=3.0)
    return folder


def alone(folder: Path, prompts: list[Prompt], sampling: Sampling) -> list[list[list[int]]]:
    """Each response by itself: no padding, no cache, the whole sequence again for each token."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT32, attn_implementation="eager").eval()
    found = []
    for p in prompts:
        found.append([])
        for k in range(sampling.n):
            ids, u = list(p.ids), torch.from_numpy(uniforms(sampling.seed, p.key, k, sampling.max_new_tokens))
            for t in range(sampling.max_new_tokens):
                with torch.no_grad():
                    logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
                ids.append(int(choose_tokens(logits, u[t : t + 1], sampling.temperature, sampling.top_p)))
                if ids[-1] in sampling.stop_ids:
                    break
            found[-1].append(ids[len(p.ids) :])
    return found


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_batches_with_a_cache_sample_what_each_response_alone_does(family: str, llama: Path, tmp_path: Path) -> None:
    """Whatever the batch, also where rows leave it and where windows are shorter than the sequences."""
    folder = llama
    if family != "llama":
        folder = tmp_path / family
        worlds.write_family(folder, llama, family, **FAMILIES[family])
    draw = np.random.RandomState(0)
    prompts = [prompt(i, draw.randint(5, 300, size=n).tolist()) for i, n in enumerate([1, 3, 4, 9, 15])]
    sampling = Sampling(n=3, temperature=0.9, top_p=0.95, max_new_tokens=10, seed=5, stop_ids=tuple(range(40, 90)))
    model = inspect_folder(folder, "model.name_or_path")
    expected = alone(folder, prompts, sampling)
    lengths = Counter(len(ids) for responses in expected for ids in responses)
    assert len(lengths) > 2, lengths  # rows did leave at different times
    lm = load_for_sampling(model, dtype=FLOAT32, device=CPU)
    for batch_tokens in (1, 60, 10_000):
        engine = TransformersEngine(lm, "a model", batch_tokens=batch_tokens)
        assert engine.sample(prompts, sampling) == expected
    assert engine.sample(prompts[3:], sampling) == expected[3:]


def test_lines_are_padded_on_either_side() -> None:
    lines = [[5, 6, 7], [8]]
    for side, ids, mask in (
        ("left", [[5, 6, 7], [9, 9, 8]], [[1, 1, 1], [0, 0, 1]]),
        ("right", [[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
    ):
        found = pad_lines(lines, 9, side, CPU)  # type: ignore[arg-type]
        assert [t.tolist() for t in found] == [ids, mask]
        assert {t.dtype for t in found} == {torch.int64}


def test_a_model_without_numbers_is_named(llama: Path) -> None:
    lm = load_for_sampling(inspect_folder(llama, "k"), dtype=FLOAT32, device=CPU)
    engine = TransformersEngine(lm, "a model", batch_tokens=100)
    torch.nn.init.constant_(engine._model.get_output_embeddings().weight, float("nan"))
    sampling = Sampling(n=2, temperature=0.9, top_p=0.9, max_new_tokens=4, seed=0, stop_ids=())
    with pytest.raises(UserError, match=r"the prompt at p\.jsonl:1 are NaN or infinite"):
        engine.sample([prompt(0, [5, 6])], sampling)


def test_batches_keep_to_the_budget() -> None:
    sampling = Sampling(n=4, temperature=1.0, top_p=1.0, max_new_tokens=10, seed=0, stop_ids=())
    lengths = [2, 5, 5, 30, 95]
    found = list(batches(lengths, sampling, 100))
    assert [row for rows in found for row in rows] == [(i, k) for i in range(5) for k in range(4)]
    for rows in found:
        assert len(rows) == 1 or len(rows) * (max(lengths[i] for i, _ in rows) + 10) <= 100
    assert [len(rows) for rows in found] == [6, 6, 2, 2, 1, 1, 1, 1]
