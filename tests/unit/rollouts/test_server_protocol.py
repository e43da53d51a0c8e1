"""What is asked of servers and what their replies mean; single answers on disk; samples beside a distribution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worlds

from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.rollouts.model_comparison import surprises
from prefopt_dist.rollouts.partial import PartialShard
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Sampling, TextResponse, choose_tokens
from prefopt_dist.rollouts.server_pool import Server, base_url
from prefopt_dist.rollouts.server_protocol import (
    AnswerRequest,
    ServerFault,
    ServerLost,
    body_of,
    read_reply,
    request_for,
    text_of,
)

PROMPT = Prompt(0, "file:1", "x", None, {}, [5, 6])
REQUEST = AnswerRequest(PROMPT, "a b", 0.9, 0.8, 4, 7, (2, 3), logprobs=True)


def reply(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [9, 2], **choice}]}


def test_each_answer_has_a_seed_of_its_own() -> None:
    sampling = Sampling(2, 0.9, 0.8, 12, 5, (3, 4))
    other = Prompt(1, "file:2", "y", None, {}, [5, 7])
    requests = [request_for(prompt, None, k, sampling) for prompt in (PROMPT, other) for k in range(2)]
    assert len({request.seed for request in requests}) == 4
    assert requests[0] == request_for(PROMPT, None, 0, sampling)
    assert request_for(PROMPT, None, 0, Sampling(2, 0.001, 0.8, 12, 5, (3, 4))).temperature == 0
    body = body_of(requests[0], "ids", "m")
    assert (body["prompt"], body["stop_token_ids"], body["max_tokens"]) == ([5, 6], [3, 4], 12)
    assert "logprobs" not in body
    assert "n" not in body
    given = json.loads(body_of(REQUEST, "generation_config", "m")["generation_config"])
    assert (given["do_sample"], given["top_k"], given["eos_token_id"]) == (True, 0, [2, 3])
    assert set(body_of(REQUEST, "text", "m")) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}


def test_what_a_reply_says() -> None:
    assert read_reply(reply(), REQUEST, "ids", 10).response == [9, 2]
    given = reply(logprobs={"token_logprobs": [-1.0, -2]})
    assert read_reply(given, REQUEST, "ids", 10).logprobs == [-1.0, -2.0]
    assert read_reply(reply(logprobs={"token_logprobs": [-1.0]}), REQUEST, "ids", 10).logprobs is None
    cut = reply(finish_reason="length", token_ids=[9, 8, 7, 6])
    assert read_reply(cut, REQUEST, "ids", 10).response == [9, 8, 7, 6]
    said = read_reply(reply() | {"usage": {"prompt_tokens": 2, "completion_tokens": 2}}, REQUEST, "text", 10)
    assert (said.response, said.tokens) == (TextResponse("a", True), 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nothing", "no choices"),
        ({"choices": []}, "no choices"),
        (reply(finish_reason="tool_calls"), "must be 'stop' or 'length'"),
        (reply(token_ids=None), "no token_ids"),
        (reply(token_ids=[9, 10, 2]), r"not all in \[0, 10\)"),
        (reply(token_ids=[9, 8]), "if and only if"),
        (reply(token_ids=[2, 9, 2]), "if and only if"),
        (reply(finish_reason="length", token_ids=[9, 2]), "if and only if"),
        (reply(token_ids=[9, 8, 7, 6, 2]), "at most 4 were asked"),
        (reply(finish_reason="length"), "if and only if"),
        (reply(finish_reason="length", token_ids=[9, 8]), "after 2 of 4 tokens; start it with a longer context"),
        (reply(prompt_token_ids=[5]), "as other token ids than were sent"),
        (reply() | {"usage": {"prompt_tokens": 3}}, "as 3 tokens, and it has 2"),
    ],
)
def test_replies_that_make_no_sense(content: Any, words: str) -> None:
    with pytest.raises(ServerLost, match=words):
        read_reply(content, REQUEST, "ids", 10)


def test_an_answer_that_was_given_up_may_be_asked_again() -> None:
    with pytest.raises(ServerFault, match="'abort'"):
        read_reply(reply(finish_reason="abort"), REQUEST, "ids", 10)


def test_prompts_as_text(tmp_path: Path) -> None:
    worlds.write_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model", "model")
    ids = tokenizer("the cat sings")["input_ids"]
    text = text_of(ids, tokenizer)
    assert text is not None
    assert tokenizer(text)["input_ids"] == ids
    split = [*tokenizer("the c")["input_ids"], *tokenizer("at")["input_ids"]]
    if split != tokenizer(tokenizer.decode(split))["input_ids"]:
        assert text_of(split, tokenizer) is None


def test_single_answers_survive_a_torn_line(tmp_path: Path) -> None:
    partial = PartialShard(tmp_path, 3)
    assert partial.answers == {}
    partial.add((0, 1), [4, 5])
    partial.add((1, 0), TextResponse("a\tb\n", True))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole + b"[1, 1, [7, 8]]\t0123")
    again = PartialShard(tmp_path, 3)
    assert again.answers == {(0, 1): [4, 5], (1, 0): TextResponse("a\tb\n", True)}
    again.add((2, 0), [6])
    assert PartialShard(tmp_path, 3).answers == {**partial.answers, (2, 0): [6]}
    file.write_bytes(whole.replace(b"4", b"7", 1))
    assert PartialShard(tmp_path, 3).answers.keys() == {(1, 0)}
    again.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_surprises_of_samples_are_what_is_expected(top_p: float) -> None:
    """Samples of another temperature, or the likeliest tokens, are far off."""
    draw = np.random.default_rng(0)
    logits = torch.from_numpy(draw.normal(size=(400, 30)) * 2).float()
    request = AnswerRequest(PROMPT, None, 0.7, top_p, 400, 0, (2, 3))

    def off(temperature: float, p: float) -> float:
        u = torch.from_numpy(draw.random(400))
        surprise, expected, variance = surprises(logits, choose_tokens(logits, u, temperature, p).tolist(), request)
        return (surprise - expected) / variance**0.5

    values = [off(0.7, top_p) for _ in range(20)]
    assert max(map(abs, values)) < 4
    assert 0.5 < np.std(values) < 1.6
    assert off(1.3, top_p) > 6
    assert off(1e-3, 1.0) < -6


def test_failures_that_come_together_count_once() -> None:
    server = Server("http://node", 8.0)
    server.failed("no", sent=1.0, now=2.0)
    server.failed("no", sent=1.5, now=2.1)
    assert server.failures == 1
    now = 2.0
    while server.lost is None:
        now = server.rests_until + 0.1
        server.failed("no", sent=now, now=now)
    assert "7 times in a row" in server.lost
    assert now < 2.0 + 40
    assert base_url("http://node:1/v1/") == base_url("http://node:1") == "http://node:1"
