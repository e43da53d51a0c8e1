"""A reward model behind a server, by a fake one: checked before it is asked, and asked for nothing twice."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeReward, serving
from generation_world import config_of
from reward_models import local_reward, write_reward
from transformers import AutoTokenizer

from prefopt_dist.data.template import Template, read_template
from prefopt_dist.errors import UserError
from prefopt_dist.rollouts import server_pool
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.reward_server import (
    KNOWN,
    KeptRewards,
    RewardServerSettings,
    RewardWay,
    ServedReward,
    check_reward_server,
    found_of_known,
)
from prefopt_dist.rollouts.rewards import RewardFailure, inspect_reward
from prefopt_dist.rollouts.server_pool import NoServerLeft
from prefopt_dist.setup import rewards

ASKED = [
    (Prompt(i, f"p:{i}", question, None, {}, []), response)
    for i, question in enumerate(["Write to Eve.", [{"role": "user", "content": "Write to my boss."}]])
    for response in ["", "Hey", "Dear boss Ada, the train is late. " * 5, "Hey", "word " * 600]
]
DISTINCT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward(tmp_path_factory.mktemp("served") / "reward")


@pytest.fixture(scope="module")
def template(folder: Path) -> Template:
    return read_template(AutoTokenizer.from_pretrained(folder), "auto")


@pytest.fixture(scope="module")
def expected(folder: Path, template: Template) -> tuple[list[Any], list[Any]]:
    """What a local copy gives to `ASKED`, and to the known answers."""
    local = local_reward(folder, template)
    return local.score(ASKED), local.score(KNOWN)


@pytest.fixture
def fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeReward]:
    monkeypatch.setattr(server_pool, "RESTS", (0.01, 0.02))
    with serving(FakeReward(folder)) as served:
        yield served


def settings(fake: FakeReward, folder: Path, key: str | None = None, seconds: float = 60.0) -> RewardServerSettings:
    name = "generate.rewards[0].server.url"
    reward = inspect_reward(str(folder), "k", served=True)
    return RewardServerSettings(fake.url, fake.name, reward, key, 4, seconds, name)


def opened(fake: FakeReward, folder: Path, template: Template, store: Path, known: Any = None) -> ServedReward:
    asked = settings(fake, folder)
    way = check_reward_server(asked, template, known, 1e-3)
    fake.answered.clear()
    return ServedReward(asked, way, template, KeptRewards(store, "digest", 0))


@pytest.mark.parametrize(("path", "takes"), [("/classify", list), ("/pooling", list), ("/classify", str)])
def test_it_gives_the_rewards_of_a_local_copy(
    folder: Path, template: Template, expected: tuple[list[Any], list[Any]], path: str, takes: type, tmp_path: Path
) -> None:
    """With token ids or text, each sequence once, and those of an earlier start are not asked for."""
    with serving(FakeReward(folder, path, takes)) as fake:
        reward = opened(fake, folder, template, tmp_path, expected[1])
        found = reward.score(ASKED)
        numbers = [value for value in found if not isinstance(value, RewardFailure)]
        assert numbers == pytest.approx([v for v in expected[0] if not isinstance(v, RewardFailure)], abs=1e-5)
        assert [i for i, v in enumerate(found) if isinstance(v, RewardFailure)] == [4, 9]  # longer than the model takes
        assert len(fake.answered) == len(set(fake.answered)) == DISTINCT
        assert fake.most_at_once <= 4
        again = opened(fake, folder, template, tmp_path, expected[1])
        assert again.score(ASKED) == found
        assert not fake.answered


def noisy() -> Callable[[list[float]], list[float]]:
    numbers = count()
    return lambda values: [v + next(numbers) for v in values]


@pytest.mark.parametrize(
    ("changes", "weights", "words"),
    [
        (lambda values: [v + 0.01 for v in values], True, ["two known answers, and the model in", "tolerance 0.001"]),
        (noisy(), False, ["does not repeat itself"]),
        (lambda values: [1.0], False, ["the same reward, 1, to two different answers", "softmax"]),
        (lambda values: [float("nan")], True, ["gives the rewards nan, nan"]),
        (lambda values: [*values, 0.5], False, ["gives no rewards", "it gave 2 numbers, must give one"]),
        (lambda values: ["high"], False, ["its reply has no reward"]),
    ],
)
def test_a_server_of_something_else_is_refused(
    fake: FakeReward,
    folder: Path,
    template: Template,
    expected: tuple[list[Any], list[Any]],
    changes: Any,
    weights: bool,
    words: list[str],
) -> None:
    fake.changes = changes
    with pytest.raises(UserError) as caught:
        check_reward_server(settings(fake, folder), template, expected[1] if weights else None, 1e-3)
    assert str(caught.value).startswith(f"generate.rewards[0].server.url: {fake.url}")
    assert all(word in str(caught.value) for word in words)


def test_a_sigmoid_is_seen_beside_the_model_alone(
    fake: FakeReward, folder: Path, template: Template, expected: tuple[list[Any], list[Any]], tmp_path: Path
) -> None:
    """A folder with a tokenizer alone is enough, and then only shape and repetition are checked."""
    fake.always_sigmoid = True
    with pytest.raises(UserError, match="serve that model, or name its folder"):
        check_reward_server(settings(fake, folder), template, expected[1], 1e-3)
    alone = shutil.copytree(folder, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    (alone / "config.json").unlink()
    asked = settings(fake, alone)
    assert asked.folder.model is None
    assert check_reward_server(asked, template, None, 1e-3).path == "/classify"


def test_failures_are_repeated_and_what_is_there_is_kept(
    fake: FakeReward, folder: Path, template: Template, expected: tuple[list[Any], list[Any]], tmp_path: Path
) -> None:
    fake.statuses = [503, 500]
    reward = opened(fake, folder, template, tmp_path, expected[1])
    fake.statuses = [500]
    fake.lives = 4
    with pytest.raises(NoServerLeft, match=r"server.url: no server is left .*(?s:.)*cannot be reached"):
        reward.score(ASKED)
    kept = len(fake.answered)
    assert 4 <= kept < DISTINCT
    fake.lives = None
    with (tmp_path / "rewards-digest-0.jsonl").open("ab") as torn:
        torn.write(b'["abc", 1')  # a line that a kill cut off
    resumed = opened(fake, folder, template, tmp_path, expected[1])
    found = resumed.score(ASKED)
    assert len(fake.answered) == DISTINCT - kept
    assert found[:4] == pytest.approx(expected[0][:4], abs=1e-5)
    fake.changes = lambda values: []
    with pytest.raises(NoServerLeft, match=r"its reply has no reward|it gave 0 numbers"):
        resumed.score([(ASKED[0][0], "another answer")])


def test_a_server_that_hangs_or_wants_a_key(fake: FakeReward, folder: Path, template: Template) -> None:
    fake.key = "the-word-of-the-server"
    check_reward_server(settings(fake, folder, fake.key), template, None, 1e-3)
    with pytest.raises(UserError, match=r"status 401.*Bearer \*\*\*"):
        check_reward_server(settings(fake, folder, "another-word"), template, None, 1e-3)
    fake.key = None
    fake.hangs.set()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"did not answer within 0.2 s"):
        check_reward_server(settings(fake, folder, seconds=0.2), template, None, 1e-3)
    assert time.monotonic() - began < 5


def test_a_sequence_that_the_server_refuses_costs_that_reward_alone(
    fake: FakeReward,
    folder: Path,
    template: Template,
    expected: tuple[list[Any], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reward = opened(fake, folder, template, tmp_path)
    complete = FakeReward.complete

    def shorter(self: FakeReward, body: dict[str, Any]) -> tuple[int, Any]:
        return (400, {"error": "longer than my context"}) if len(body["input"]) > 100 else complete(self, body)

    monkeypatch.setattr(FakeReward, "complete", shorter)
    found = reward.score(ASKED[:4])
    assert isinstance(found[2], RewardFailure)
    assert "longer than my context" in found[2].reason
    assert [*found[:2], found[3]] == pytest.approx([*expected[0][:2], expected[0][3]], abs=1e-5)


def test_a_known_answer_without_a_reward_is_named() -> None:
    assert found_of_known([1.0, 2.0], "k") == [1.0, 2.0]
    with pytest.raises(UserError, match=r"^k: the reward of the known answer 'I do not .*' returned nan$"):
        found_of_known([1.0, RewardFailure("returned nan")], "k")


def test_all_ranks_ask_as_rank_zero_has_found(
    fake: FakeReward, folder: Path, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is rank 0's; here is rank 1, which asks for the rewards of its answers alone."""
    fake.path, fake.takes = "/pooling", str
    monkeypatch.setattr(rewards.ranks, "rank", lambda: 1)
    monkeypatch.setattr(rewards.ranks, "world_size", lambda: 2)
    monkeypatch.setattr(rewards.ranks, "run_on_rank_zero", lambda check: {0: RewardWay("/pooling", "text")})
    monkeypatch.setattr(rewards.ranks, "run_on_all_ranks", lambda load: load())
    asked = rewards.ConfiguredRewards(config_of(tmp_path, "run"), [("k", settings(fake, folder))], "scores", [{}])
    (reward,) = asked.open(template, tmp_path)
    reward.score(ASKED[1:2])
    assert len(fake.answered) == 1


def test_a_folder_with_weights_on_one_node_alone_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks hash the weights together: a rank without them would leave the others waiting."""
    monkeypatch.setattr(rewards.ranks, "all_gather", lambda mine: [mine, [False]])
    with pytest.raises(UserError, match=r"^key: .* has weights on rank 0 but none on rank 1, must be the same"):
        rewards._refuse_other_folders([inspect_reward(str(folder), "key", served=True)])
