"""Answers and the pairs or ranked rows that are made of them, and how models' answers are compared."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from prompts_and_answers import answered, tokeniser, write
from tokenizers_for_tests import CHATML, small_tokenizer

from prefopt_dist.config import DataSource
from prefopt_dist.data.column_files import open_rows
from prefopt_dist.data.forms import detect_form, read_form
from prefopt_dist.data.prepare import prepare_rows
from prefopt_dist.monitoring.statistics import interval
from prefopt_dist.rollouts import comparison, pairs
from prefopt_dist.rollouts.prompts import read_prompts
from prefopt_dist.rollouts.store import AnsweredPrompt, answers_of


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


def test_wins_and_intervals() -> None:
    assert comparison.win_rate(np.array([1.0, 2.0]), np.array([1.0, 0.0, 3.0])) == pytest.approx((0.5 + 1 + 1 + 1) / 6)
    found = interval(np.array([0.0, 1.0, 1.0, 0.0, 1.0]))
    assert found["mean"] == pytest.approx(0.6)
    half = NormalDist().inv_cdf(0.975) * (0.3**0.5) / 5**0.5  # the variance of 0, 1, 1, 0, 1 with n - 1 is 0.3
    assert found["high"] == pytest.approx(0.6 + half)
    assert interval(np.array([2.0])) == {"mean": 2.0, "low": None, "high": None}
    mine, theirs = [answered(1.0, 2.0), answered(5.0, 5.0)], [answered(0.0, 2.0), answered(5.0, "raised")]
    assert comparison.compare_rewards(mine, theirs, (1.0,))["win_rate"]["mean"] == pytest.approx((2.5 / 4 + 0.5) / 2)
    wins = comparison.compare_rewards([answered(1.0)] * 5, [answered(0.0)] * 4 + [answered(1.0)], (1.0,))["win_rate"]
    assert wins["mean"] == pytest.approx(0.9)
    assert wins["high"] == 1.0  # mean + half is 1.096, which would be no share
    assert comparison.compare_rewards(mine, theirs, (1.0,))["difference"]["mean"] == pytest.approx(0.25)
    assert comparison.summary(theirs, (1.0,))["without_reward"] == 1
    ratios = comparison.kl(mine, np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.0, 0.0, 2.0]))
    assert ratios["mean"] == pytest.approx((1.5 + 2.5) / 2)
