"""A judge that compares answers in both orders, by a fake one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_server import FakeJudge, serving

from prefopt_dist.rollouts import server_pool
from prefopt_dist.rollouts.judge import JudgeCounts, JudgeReward, JudgeSettings, ask_text, read_verdict
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.rewards import RewardFailure
from prefopt_dist.rollouts.server_pool import NoServerLeft

QUESTION = "About {prompt}: <<{first}>> or <<{second}>>?"
TWO = [Prompt(0, "p:1", "x", None, {}, [1]), Prompt(1, "p:2", [{"role": "user", "content": "y"}], None, {}, [2])]
ANSWERS = [(TWO[0], "aaa"), (TWO[0], "a"), (TWO[0], "aa"), (TWO[1], "b"), (TWO[1], "bbbb"), (TWO[1], "b")]


def reward(url: str, in_flight: int = 4) -> JudgeReward:
    return JudgeReward(JudgeSettings(url, "m", QUESTION, 9, None, in_flight, 60.0, "generate.rewards[0].judge.server"))


def longer(first: str, second: str) -> str:
    return "first" if len(first) > len(second) else "second" if len(first) < len(second) else "tie"


def judged(prefers: Callable[[str, str], str]) -> tuple[list[float | RewardFailure], JudgeReward, FakeJudge]:
    with serving(FakeJudge(prefers)) as fake:
        judge = reward(fake.url)
        return judge.score(ANSWERS), judge, fake


def test_an_answer_gets_the_share_that_it_beats() -> None:
    """Equal answers tie without being asked about."""
    scores, judge, fake = judged(longer)
    assert scores == [1.0, 0.0, 0.5, 0.25, 1.0, 0.25]
    assert judge.counts == JudgeCounts(comparisons=5, ties=0, first=5, second=5, tokens=1000)
    assert len(fake.answered) == 10
    assert {(b, a) for a, b in fake.answered} == set(fake.answered)
    assert fake.most_at_once <= 4


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_judge_that_prefers_a_place_makes_ties_alone(place: str) -> None:
    scores, judge, _ = judged(lambda first, second: place)
    assert scores == [0.5] * 6
    assert (judge.counts.ties, judge.counts.orders_disagree) == (5, 5)
    assert f"All are ties, so the judge decides nothing: it takes whatever is shown {place}" in judge.counts.text()


def test_replies_without_a_verdict_are_ties() -> None:
    scores, judge, _ = judged(lambda first, second: "the first or the second")
    assert scores == [0.5] * 6
    assert judge.counts.unreadable == 10
    assert "it takes whatever" not in judge.counts.text()


def test_a_single_answer_has_no_reward_and_a_lost_judge_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "RESTS", (0.01,))
    with serving(FakeJudge(longer)) as fake:
        (one,) = reward(fake.url).score(ANSWERS[:1])
        assert isinstance(one, RewardFailure)
        fake.statuses = [500] * 100
        with pytest.raises(NoServerLeft, match=r"generate.rewards\[0\].judge.server: no server is left"):
            reward(fake.url).score(ANSWERS)


def test_what_is_asked_and_what_a_reply_says() -> None:
    assert ask_text(QUESTION, TWO[1], "{second}", "{first}") == "About user: y: <<{second}>> or <<{first}>>?"
    assert read_verdict("first is bad\n\n**Second**\n ") == "second"
    assert read_verdict("Verdict: tie.") == "tie"
    assert read_verdict("first\nI cannot say") is None
    assert read_verdict("") is None


class _Reasons(FakeJudge):
    """Refuses long questions, and is cut while it reasons about others."""

    takes = 10**6
    finish = "stop"
    said = "first"

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if len(body["messages"][0]["content"]) > self.takes:
            return 400, {"error": "longer than my context"}
        with self.lock:
            self.answered.append(body)
        return 200, {"choices": [{"message": {"content": self.said}, "finish_reason": self.finish}]}


def test_a_comparison_that_the_judge_refuses_costs_that_answer_alone() -> None:
    with serving(_Reasons(longer)) as fake:
        fake.takes = 100
        judge = reward(fake.url)
        scores = judge.score([(TWO[0], "a"), (TWO[0], "b"), (TWO[0], "c" * 100), (TWO[1], "d"), (TWO[1], "e")])
    assert scores[:2] + scores[3:] == [0.5] * 4
    assert isinstance(scores[2], RewardFailure)
    assert "longer than my context" in scores[2].reason
    assert judge.counts.comparisons == 2


@pytest.mark.parametrize(
    ("said", "finish", "unreadable"),
    [
        ("Let me look at the first", "length", 2),
        ("**First**", "length", 0),
        (None, "stop", 2),
        ("So: first", "stop", 0),
    ],
)
def test_a_reply_that_was_cut_is_no_verdict(said: str, finish: str, unreadable: int) -> None:
    """But for a reply that is the word alone, as where one token is asked for."""
    with serving(_Reasons(longer)) as fake:
        fake.said, fake.finish = said, finish
        judge = reward(fake.url)
        assert judge.score(ANSWERS[:2]) == [0.5, 0.5]
    assert judge.counts.unreadable == unreadable
    assert ("No reply ends with a verdict" in judge.counts.text()) is (unreadable == 2)


def test_the_judge_reads_calls_and_tools_as_json() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    asked = ask_text(QUESTION, Prompt(0, "", turns, [{"name": "add"}], {}, []), "{second}", "b")
    assert (
        asked
        == f'About tools: [{{"name": "add"}}]\n\nassistant: {json.dumps(call)}\n\ntool: 2: <<{{second}}>> or <<b>>?'
    )
