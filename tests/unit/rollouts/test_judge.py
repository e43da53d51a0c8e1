"""A judge that compares answers in both orders, by a fake one."""

from __future__ import annotations

from collections.abc import Callable

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
