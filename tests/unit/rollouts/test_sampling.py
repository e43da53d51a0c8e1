"""Sampling: the noise, the choice of a token, and the tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers_for_tests import CHATML, small_tokenizer

from prefopt_dist.data.template import read_template
from prefopt_dist.errors import UserError
from prefopt_dist.rollouts.sampling import choose_tokens, cumulative_in_units, seed_of_model, stop_ids_of, uniforms


def test_noise_depends_on_what_it_is_for_alone() -> None:
    key = b"k" * 16
    long = uniforms(3, key, 2, 1000)
    assert np.array_equal(uniforms(3, key, 2, 10), long[:10])
    others = [uniforms(4, key, 2, 10), uniforms(3, b"l" * 16, 2, 10), uniforms(3, key, 1, 10)]
    assert all(not np.intersect1d(long, other).size for other in others)
    assert not np.array_equal(uniforms(3, key, 2, 10, "rejected"), long[:10])
    assert long.min() >= 0
    assert long.max() < 1
    # 1000 uniform numbers: mean ½ ± 5 · 0.0091
    assert abs(long.mean() - 0.5) < 0.046
    # What was sampled yesterday must be sampled today.
    assert uniforms(0, bytes(16), 0, 3).tolist() == PINNED


def test_models_draw_independently_of_each_other() -> None:
    """By the correlation of 1000 draws each: within 4 standard errors (1/√1000) of 0."""
    seeds = [seed_of_model(seed, key) for seed in (0, 1) for key in ("a" * 32, "b" * 32)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert seed_of_model(0, "a" * 32) == seeds[0]
    draws = [uniforms(seed, b"k" * 16, 0, 1000) for seed in (0, *seeds)]
    correlations = np.corrcoef(draws)[~np.eye(5, dtype=bool)]
    assert np.abs(correlations).max() < 4 / 1000**0.5


PINNED = [0.545349881154394, 0.5088387252874981, 0.9003250769613084]


def test_a_token_is_chosen_as_often_as_its_probability_says() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, float("-inf"), 2.0])
    n = 20000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for temperature in (1.0, 0.5):
        chosen = choose_tokens(logits.expand(n, -1), u, temperature, 1.0)
        exact = torch.softmax(logits.double() / temperature, -1)
        assert torch.allclose(torch.bincount(chosen, minlength=5) / n, exact.float(), atol=1.01 / n + 1e-6)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    rows = probabilities.log().expand(len(u), -1)
    for top_p, kept in ((0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})):
        assert set(choose_tokens(rows, u, 1.0, top_p).tolist()) == kept
    share = (choose_tokens(rows, u, 1.0, 0.6) == 1).double().mean()
    assert share == pytest.approx(0.4 / 0.7, abs=2e-3)


def test_the_ends_of_the_interval_choose_a_token_that_has_probability() -> None:
    logits = torch.full((2, 7), float("-inf"))
    logits[:, 2:4] = torch.tensor([0.3, 0.1])
    last = float(np.nextafter(1.0, 0.0))
    assert choose_tokens(logits, torch.tensor([0.0, last], dtype=torch.float64), 1.0, 1.0).tolist() == [2, 3]


def test_cumulative_sums_in_whole_units() -> None:
    """Those of train.deterministic on CUDA: the same sums within float64's rounding, in order, NaN where a line is."""
    logits = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0)) * 5
    logits[1, :3] = torch.tensor([100.0, -torch.inf, 100.0])
    probabilities = torch.softmax(logits, -1).double()
    sums = cumulative_in_units(probabilities)
    assert torch.allclose(sums, probabilities.cumsum(-1), rtol=0, atol=1e-14)
    assert (sums.diff(dim=-1) >= 0).all()
    assert sums[1, 0] == sums[1, 1] == 0.5, "a token without probability has no share"
    probabilities[3, 7] = torch.nan
    assert cumulative_in_units(probabilities).isnan().any(-1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(("said", "more"), [(None, []), (7, [7]), ([7, 9], [7, 9])])
def test_an_answer_ends_by_the_template_and_by_what_the_folder_says(tmp_path: Path, said: Any, more: list[int]) -> None:
    tokenizer = small_tokenizer(CHATML)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    end = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    assert stop_ids_of(read_template(tokenizer, "auto"), tmp_path, "evaluate.model") == tuple(sorted({*end, *more}))
    assert stop_ids_of(read_template(tokenizer, "auto"), tmp_path / "none", "evaluate.model") == tuple(sorted(end))


def test_a_generation_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"^evaluate\.model: .*generation_config\.json cannot be read"):
        stop_ids_of(read_template(small_tokenizer(CHATML), "auto"), tmp_path, "evaluate.model")
