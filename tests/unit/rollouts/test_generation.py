"""Sampling, rewards and pairs, part by part."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import rewards_for_tests
import torch
import worlds
from letters import score
from reward_models import write_reward
from tokenizers_for_tests import CHATML, small_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt_dist.config import DataSource
from prefopt_dist.data.column_files import open_rows
from prefopt_dist.data.forms import detect_form, read_form
from prefopt_dist.data.prepare import prepare_rows
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.monitoring.statistics import interval
from prefopt_dist.rollouts import comparison, pairs
from prefopt_dist.rollouts.prompts import Prompt, Prompts, Turn, read_prompts
from prefopt_dist.rollouts.rewards import ClassifierReward, FunctionReward, RewardFailure, find_function, inspect_reward
from prefopt_dist.rollouts.sampling import (
    Sampling,
    choose_tokens,
    cumulative_in_units,
    pad_lines,
    seed_of_model,
    stop_ids_of,
    uniforms,
)
from prefopt_dist.rollouts.store import Answer, AnsweredPrompt, SampleStore, answers_of
from prefopt_dist.rollouts.transformers_engine import TransformersEngine, batches, load_for_sampling

FLOAT32, CPU = torch.float32, torch.device("cpu")


def prompt(index: int, ids: list[int], text: str = "say", **row: Any) -> Prompt:
    return Prompt(index, f"p.jsonl:{index + 1}", text, None, row, ids)


# Noise


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


# Choosing a token


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


# The engine


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


# Prompts


def tokeniser(max_length: int = 200, mode: str = "auto") -> Tokeniser:
    return Tokeniser(read_template(small_tokenizer(CHATML), mode), max_length, max_length // 2)


def write(file: Path, *rows: Any) -> list[DataSource]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [DataSource(str(file))]


def test_prompts_are_read_from_rows_of_every_form(tmp_path: Path) -> None:
    user, reply = {"role": "user", "content": "what is blue?"}, {"role": "assistant", "content": "the sky"}
    rows = [
        {"prompt": "what is quick?", "answer": 7},
        {"prompt": "what is green?", "chosen_response": "grass", "rejected_response": "the sky"},
        {"prompt": "what is one?", "chosen": "a", "rejected": "b"},
        {"chosen": [user, reply], "rejected": [user, {"role": "assistant", "content": "grass"}]},
        {"messages": [user, reply, user]},
        {"messages": [{"role": "system", "content": "you are a helpful assistant"}, user, reply]},
        {"prompt": [user], "completion": "the sky", "label": True},
        {
            "chosen": "\n\nHuman: what is two?\n\nAssistant: yes",
            "rejected": "\n\nHuman: what is two?\n\nAssistant: no",
        },
    ]
    found = read_prompts(
        write(tmp_path / "p.jsonl", *rows), tokeniser=tokeniser(), longest=100, on_bad_row="stop", key="data.train"
    )
    in_order = sorted(found.all, key=lambda p: p.index)
    assert [p.origin.rpartition(":")[2] for p in in_order] == ["1", "2", "3", "4", "5", "6", "8"]
    assert found.repeated == 1  # row 7 asks what row 4 asks
    assert in_order[0].row == rows[0]
    lengths = [len(p.ids) for p in found.all]
    assert lengths == sorted(lengths)
    tokenizer = small_tokenizer(CHATML)
    for p in found.all:
        turns = [{"role": "user", "content": p.prompt}] if isinstance(p.prompt, str) else p.prompt
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert p.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_parts_of_the_prompts_take_turns() -> None:
    """Each prompt once before one comes again, in an order by the seed, whatever the order of the file."""
    everything = [Prompt(i, f"f:{i}", "x", None, {}, [i]) for i in range(10)]
    prompts = Prompts(everything, 10, 0, {})

    def taken(number: int, size: int, seed: int = 0, of: Prompts = prompts) -> list[int]:
        return [prompt.index for prompt in Turn(number, size, seed).of(of).all]

    first, second, third, fourth = (taken(number, 4) for number in range(4))
    assert [len(part) for part in (first, second, third, fourth)] == [4] * 4
    assert sorted([*first, *second, *(set(third) - set(first))]) == list(range(10))
    assert set(fourth).isdisjoint(third)
    assert all(part == sorted(part) for part in (first, second, third))  # by length, as before
    assert taken(0, 4, seed=1) != first
    assert taken(7, 20) == list(range(10))
    assert sorted(taken(1, 4, of=Prompts(everything[::-1], 10, 0, {}))) == second


def test_bad_prompts_stop_or_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "no prompt"}, {"prompt": "what is blue?"}, {"prompt": "sky " * 50}, {"prompt": "  "}]
    sources = write(tmp_path / "p.jsonl", *rows)
    with pytest.raises(UserError, match=r"p\.jsonl:1: missing_field: a row needs a prompt"):
        read_prompts(sources, tokeniser=tokeniser(), longest=60, on_bad_row="stop", key="data.train")
    found = read_prompts(sources, tokeniser=tokeniser(), longest=60, on_bad_row="drop", key="data.train")
    assert [p.prompt for p in found.all] == ["what is blue?"]
    assert found.dropped == {"missing_field": 1, "prompt_too_long": 1, "empty_prompt": 1}
    with pytest.raises(UserError, match="no prompt is left"):
        read_prompts(
            write(tmp_path / "q.jsonl", {"text": 1}), tokeniser=tokeniser(), longest=60, on_bad_row="drop", key="k"
        )


# Answers


def test_an_answer_is_exact_where_training_gets_its_ids(tmp_path: Path) -> None:
    """By training's own reading of the row that a pair becomes."""
    tokenizer, of = small_tokenizer(CHATML), tokeniser()
    end, turn = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|im_start|>"))
    (p,) = read_prompts(
        write(tmp_path / "p.jsonl", {"prompt": "what is blue?"}), tokeniser=of, longest=99, on_bad_row="stop", key="k"
    ).all
    sky = tokenizer("the sky is blue.", add_special_tokens=False)["input_ids"]
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "sky"]  # other tokens of a word that is one token or two
    opened = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    assert letters != tokenizer("sky", add_special_tokens=False)["input_ids"]
    sampled = [[*sky, end], [*letters, end], sky, [end], [turn, *opened, *sky, end]]
    found = answers_of(p, sampled, (end,), of)
    assert [(a.text, a.fault, a.exact) for a in found] == [
        ("the sky is blue.", None, True),
        ("sky", None, False),
        ("the sky is blue.", "unfinished", False),
        ("", "empty_response", False),
        ("<|im_start|>assistant\nthe sky is blue.", "doubled_template", False),
    ]
    scores = [[float(i)] for i in range(5)]
    rule = pairs.PairingRule("best_worst", 0.0, (1.0,), 0)
    tally = pairs.PairCounts()
    ((chosen, rejected),) = pairs.make_pairs(AnsweredPrompt(p, found, scores), rule, tally)
    assert (chosen.number, rejected.number, tally.retokenised) == (1, 0, 1)
    assert tally.answers == {"unfinished": 1, "empty_response": 1, "doubled_template": 1}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pairs.pair_row(p, (rejected, chosen), {})) + "\n")
    rows = open_rows(
        prepare_rows(
            [DataSource(str(file))],
            tokenizer=tokenizer,
            form="auto",
            template="auto",
            max_length=200,
            max_prompt_length=100,
            on_bad_row="stop",
            cache_dir=tmp_path / "cache",
            vocab_size=len(tokenizer),
            say=lambda text: None,
        )
    )
    assert rows.prompt(0).tolist() == p.ids
    assert rows.response(0, 0).tolist() == [*sky, end]
    assert rows.response(0, 1).tolist() != [*letters, end]


# Pairs


def answered(*values: Any, texts: str | None = None) -> AnsweredPrompt:
    said = [list(v) if isinstance(v, tuple) else [v] for v in values]
    texts = texts or "abcdefgh"[: len(said)]
    return AnsweredPrompt(prompt(0, [1, 2]), [Answer([9], t, None, True) for t in texts], said)


def made(
    found: AnsweredPrompt, pairing: str, margin: float = 0.0, weights: tuple[float, ...] = (1.0,), seed: int = 0
) -> Any:
    tally = pairs.PairCounts()
    of = pairs.make_pairs(found, pairs.PairingRule(pairing, margin, weights, seed), tally)
    return [(a.number, b.number) for a, b in of], dict(tally.prompts), dict(tally.answers)


def test_best_and_worst() -> None:
    assert made(answered(1.0, 3.0, 0.0, 3.0, 0.0), "best_worst") == ([(1, 4)], {}, {})
    assert made(answered(1.0, 3.0, 0.5, 2.0), "best_worst")[0] == [(1, 2)]
    assert made(answered(2.0, 2.0, 2.0), "best_worst") == ([], {"tie": 1}, {})
    assert made(answered(1.0, 1.5), "best_worst", 0.6) == ([], {"margin below min_margin": 1}, {})
    assert made(answered(1.0, 1.5), "best_worst", 0.5)[0] == [(1, 0)]
    assert made(answered(1.0, "raised"), "best_worst") == ([], {"fewer than two answers": 1}, {"no reward": 1})
    # The same words with another number: the first counts.
    assert made(answered(1.0, 5.0, 2.0, texts="aab"), "best_worst") == ([(2, 0)], {}, {"repeats another answer": 1})


def test_best_and_a_random_lesser_one() -> None:
    found = answered(1.0, 4.0, 0.0, 4.0, 2.0)
    drawn = Counter(made(found, "best_random", seed=s)[0][0] for s in range(300))
    assert set(drawn) == {(1, 0), (1, 2), (1, 4)}
    assert min(drawn.values()) > 60  # 100 ± 4 · 8
    assert made(found, "best_random", seed=7) == made(found, "best_random", seed=7)


def test_every_two_beyond_a_margin() -> None:
    found = answered(1.0, 4.0, 0.0, 4.0, 2.0)
    assert set(made(found, "margin", 2.0)[0]) == {(1, 4), (3, 4), (1, 0), (3, 0), (1, 2), (3, 2), (4, 2)}
    assert set(made(found, "margin", 0.0)[0]) >= {(4, 0), (0, 2)}
    assert made(found, "margin", 5.0) == ([], {"margin below min_margin": 1}, {})


def test_all_answers_as_a_ranked_row() -> None:
    """Best first, equal rewards included; the row is of the form `ranked`, and a loss on pairs takes its ends."""
    found, tally = answered(1.0, 4.0, 0.0, "raised", 4.0, 2.0), pairs.PairCounts()
    rule = pairs.PairingRule("ranked", 4.0, (1.0,), 0)
    (answers,) = pairs.make_pairs(found, rule, tally)
    assert [a.number for a in answers] == [1, 4, 5, 0, 2]
    assert tally.answers == {"no reward": 1}
    row = json.loads(json.dumps(pairs.ranked_row(found.prompt, answers, {})))
    assert row["scores"] == [4.0, 4.0, 2.0, 1.0, 0.0]
    assert [one["sample"] for one in row["response_scores"]] == [1, 4, 5, 0, 2]
    assert detect_form([row], "data.format") == "ranked"
    example = read_form("ranked", row, ranked=True)
    assert (example.responses, example.scores) == (("b", "e", "f", "a", "c"), (4, 4, 2, 1, 0))
    assert set(example.ignored) == {"response_scores", "origin", "generated"}
    assert read_form("ranked", row).responses == ("b", "c")
    assert pairs.make_pairs(found, replace(rule, min_margin=4.5), tally) == []
    assert tally.prompts == {"margin below min_margin": 1}
    turns = replace(found.prompt, prompt=[{"role": "user", "content": "q"}])
    assert pairs.ranked_row(turns, answers, {})["responses"][0] == [{"role": "assistant", "content": "b"}]


def test_the_mean_of_rewards_is_weighted() -> None:
    found = answered((1.0, 0.0), (0.0, 1.0))
    assert made(found, "best_worst", weights=(3.0, 1.0))[0] == [(0, 1)]
    assert made(found, "best_worst", weights=(1.0, 3.0))[0] == [(1, 0)]
    assert made(found, "best_worst", weights=(1.0, 1.0))[1] == {"tie": 1}
    ((chosen, _),) = pairs.make_pairs(found, pairs.PairingRule("best_worst", 0.0, (3.0, 1.0), 0), pairs.PairCounts())
    assert (chosen.reward, chosen.values) == (0.75, [1.0, 0.0])


# Rewards


def test_functions_are_asked_with_prompt_response_and_row() -> None:
    asked = [(prompt(0, [1], hint="four"), "a house"), (prompt(1, [2]), "sky")]
    assert FunctionReward(rewards_for_tests.letters).score(asked) == [7.0, 3.0]
    assert FunctionReward(rewards_for_tests.same).score(asked) == [1.0, 1.0]
    assert FunctionReward(rewards_for_tests.raises).score(asked[:1]) == [
        RewardFailure("raised KeyError: 'no answer column'")
    ]
    assert FunctionReward(rewards_for_tests.nothing).score(asked) == [
        RewardFailure("returned nan, which is not finite"),
        RewardFailure("returned nan, which is not finite"),
    ]
    assert FunctionReward(rewards_for_tests.nothing).score([(asked[0][0], "ab")]) == [
        RewardFailure("returned None, which is not a number")
    ]
    huge = FunctionReward(lambda prompt, response, row: 10**400)
    assert huge.score(asked[:1]) == [
        RewardFailure("returned a number that is too large for a float, so it is not finite")
    ]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("rewards_for_tests", "must be module:name"),
        ("no_such_module:score", "cannot be imported (ModuleNotFoundError"),
        ("rewards_for_tests:letter", "did you mean letters?"),
        ("rewards_for_tests:CONSTANT", "is a int, must be a function"),
    ],
)
def test_a_function_that_is_not_there(path: str, words: str) -> None:
    with pytest.raises(UserError) as told:
        find_function(path, "generate.rewards[0].function")
    assert words in str(told.value)
    assert str(told.value).startswith("generate.rewards[0].function: ")


def test_a_function_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python itself does not look into the working folder, as in an image or under slurm/job.sh."""
    (tmp_path / "reward_of_this_folder.py").write_text("def score(prompt, response, row):\n    return len(response)\n")
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    assert find_function("reward_of_this_folder:score", "k")("", "four", {}) == 4
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize("pad", [True, False])
def test_a_reward_model_scores_as_in_plain_transformers(tmp_path: Path, pad: bool) -> None:
    folder = write_reward(tmp_path / "reward", pad=pad)
    template = read_template(AutoTokenizer.from_pretrained(folder), "auto")
    reward = ClassifierReward(
        inspect_reward(str(folder), "k"), template=template, dtype=FLOAT32, device=CPU, batch_tokens=200
    )
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Write to my boss."}]
    asked = [
        (Prompt(i, "p:1", question, None, {}, []), response)
        for i, question in enumerate(["Write to my friend Eve that the car is repaired.", turns, "Hey"])
        for response in ["", "Hey", "Dear boss Ada, the train is late. " * 5, "Good day<|end|>"]
    ]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for p, response in asked:
        said = [{"role": "user", "content": p.prompt}] if isinstance(p.prompt, str) else p.prompt
        inputs = tokenizer.apply_chat_template(
            [*said, {"role": "assistant", "content": response}], return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            expected.append(model(**inputs).logits[0, 0].item())
    assert len(set(expected)) == len(expected)
    assert reward.score(asked) == pytest.approx(expected, abs=2e-6)
    (long,) = reward.score([(asked[0][0], "word " * 600)])
    assert isinstance(long, RewardFailure)
    assert long.reason.startswith("takes at most 512 tokens, but prompt and response have ")
    carried = Prompt(0, "p:7", "<|user|>Hey<|end|><|assistant|>", None, {}, [])
    with pytest.raises(UserError, match="p:7: the prompt is already rendered"):
        reward.score([(carried, "Hey")])


def test_a_reward_model_that_is_none(tmp_path: Path) -> None:
    two = write_reward(tmp_path / "two", outputs=2)
    with pytest.raises(UserError, match=r"^k: .* has 2 outputs \(num_labels\), must have 1"):
        inspect_reward(str(two), "k")
    worlds.write_model(tmp_path / "lm")
    with pytest.raises(UserError, match="is a LlamaForCausalLM, must be a sequence classifier"):
        inspect_reward(str(tmp_path / "lm"), "k")
    silent = write_reward(tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        inspect_reward(str(silent), "k")
    headless = write_reward(tmp_path / "headless")
    torch_model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    config = (headless / "config.json").read_text()
    torch_model.save_pretrained(headless)
    (headless / "config.json").write_text(config)
    template = read_template(AutoTokenizer.from_pretrained(headless), "auto")
    with pytest.raises(UserError, match=r"lacks the weights score\.weight"):
        ClassifierReward(
            inspect_reward(str(headless), "k"), template=template, dtype=FLOAT32, device=CPU, batch_tokens=9
        )


def test_the_true_reward_of_the_world() -> None:
    asked = "Write to my boss Ada that the train is late."
    formal = "Good day boss Ada, please note that the train is late. Kind regards"
    casual = "Hi boss Ada, just so you know, the train is late. Cheers"
    assert [score(asked, text, {}) for text in (formal, casual, formal[:-8], casual[:-7] + " Kind regards")] == [
        1.0,
        0.5,
        0.25,
        0.25,
    ]
    assert score(asked, formal.replace("Ada", "Ben"), {}) == 0.5
    assert score([{"role": "user", "content": asked.replace("boss", "friend")}], "Hey friend Ada", {}) == 0.25


# Comparison


def test_wins_and_intervals() -> None:
    assert comparison.win_rate(np.array([1.0, 2.0]), np.array([1.0, 0.0, 3.0])) == pytest.approx((0.5 + 1 + 1 + 1) / 6)
    found = interval(np.array([0.0, 1.0, 1.0, 0.0, 1.0]))
    assert found["mean"] == pytest.approx(0.6)
    half = NormalDist().inv_cdf(0.975) * (0.3**0.5) / 5**0.5  # the variance of 0, 1, 1, 0, 1 with n - 1 is 0.3
    assert found["high"] == pytest.approx(0.6 + half)
    assert interval(np.array([2.0])) == {"mean": 2.0, "low": None, "high": None}
    mine, theirs = [answered(1.0, 2.0), answered(5.0, 5.0)], [answered(0.0, 2.0), answered(5.0, "raised")]
    assert comparison.compare_rewards(mine, theirs, (1.0,))["win_rate"]["mean"] == pytest.approx((2.5 / 4 + 0.5) / 2)
    assert comparison.compare_rewards(mine, theirs, (1.0,))["difference"]["mean"] == pytest.approx(0.25)
    assert comparison.summary(theirs, (1.0,))["without_reward"] == 1
    ratios = comparison.kl(mine, np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.0, 0.0, 2.0]))
    assert ratios["mean"] == pytest.approx((1.5 + 2.5) / 2)


# The store


def test_a_row_may_hold_what_json_has_no_word_for(tmp_path: Path) -> None:
    """A missing number of a table is NaN there; rewards that look for it get it."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "what is blue?", "score": NaN, "date": Infinity}\n')
    sources = [DataSource(str(tmp_path / "p.jsonl"))]
    found = read_prompts(sources, tokeniser=tokeniser(), longest=99, on_bad_row="stop", key="k")
    store = SampleStore(tmp_path / "s")
    store.make_plan(found.all, {})
    row = store.prompts(0)[0].row
    assert np.isnan(row["score"])
    assert row["date"] == float("inf")


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s")
    many = [prompt(i, [1, 2, 3 + i], "a\u2028b") for i in range(70)]
    store.make_plan(many, {"model": "m"})
    store.make_plan([], {})  # there is one
    assert store.missing("samples") == ([0, 1], [])
    answers = [Answer([4, 5], "é\u2028\n", None, True)]
    store.write_answers(1, [answers] * 6)
    assert store.missing("samples") == ([0], [])
    assert store.answers(1) == [answers] * 6
    assert store.prompts(0) + store.prompts(1) == many
    store.write_scores("scores-r", 0, [[[0.5]]] * 64)
    store.write_scores("scores-r", 1, [[[0.5]]] * 6)
    assert store.missing("scores-r") == ([], [])
    file = tmp_path / "s" / "samples-00001.jsonl"
    file.write_bytes(file.read_bytes().replace(b"[4, 5]", b"[4, 6]", 1))
    numbers, (message,) = store.missing("samples")
    assert numbers == [0, 1]
    assert "does not match its checksum" in message
    assert not file.exists()
    store.write_answers(1, [[Answer([6], "another", None, True)]] * 6)
    assert store.missing("scores-r") == ([1], [])  # what was said of the lost answers is not of these


def test_a_shard_of_another_node_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may remember that a name was not there until the folder is read."""
    store = SampleStore(tmp_path / "s")
    store.make_plan([prompt(0, [1])], {})
    store.write_answers(0, [[]])
    exists, listdir, stale = Path.exists, os.listdir, True

    def look(path: Path) -> bool:
        return exists(path) and not (stale and path.name.startswith("samples"))

    def read(folder: Path) -> list[str]:
        nonlocal stale
        stale = False
        return listdir(folder)

    monkeypatch.setattr(Path, "exists", look)
    monkeypatch.setattr(os, "listdir", read)
    assert store.answers(0) == [[]]
    stale = True
    assert store.missing("samples") == ([], [])
