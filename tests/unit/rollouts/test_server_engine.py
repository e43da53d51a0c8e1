"""Servers that fail while they are asked, by a fake one: it is left out and named; no answer is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import worlds
from fake_server import FakeServer, serving
from generation_world import write_world
from safetensors.torch import load_file

from prefopt_dist.errors import UserError
from prefopt_dist.rollouts import server_pool
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Response, Sampling
from prefopt_dist.rollouts.server_engine import ServerEngine, ServerSettings
from prefopt_dist.rollouts.server_pool import Contract, NoServerLeft, ServerPool
from prefopt_dist.rollouts.server_protocol import (
    AnswerRequest,
    Known,
    ServerFault,
    ServerLost,
    body_of,
    read_reply,
)

N = 4
SHARDS = [0, 1, 2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("servers")
    write_world(folder)
    return folder


@pytest.fixture(autouse=True)
def short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "RESTS", (0.01, 0.02, 0.04))


@pytest.fixture
def servers(world: Path) -> Iterator[Any]:
    """Starts fake servers of the world's model."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(serving(FakeServer(world / "model")))


def prompts_of(shard: int) -> list[Prompt]:
    return [Prompt(i, f"p:{i}", "x", None, {}, [40 + shard, 50 + i, 60]) for i in range(4)]


def answer(
    folder: Path,
    fakes: Sequence[FakeServer],
    *,
    seconds: float = 60.0,
    in_flight: int = 4,
    stop_at: int | None = None,
    known: Known | None = None,
) -> tuple[dict[int, list[list[Response]]], dict[str, Any], bool]:
    """The committed answers by shard, the record, and whether some are missing."""
    settings = ServerSettings(tuple(f.url for f in fakes), None, in_flight, seconds, 300)
    engine = ServerEngine(settings, [(Contract("the-model", "ids", True, known), None)] * len(fakes), None)
    done: dict[int, list[list[Response]]] = {}
    sampling = Sampling(N, 0.9, 1.0, 8, 3, fakes[0].stops)

    def halted() -> bool:
        return stop_at is not None and sum(len(fake.answered) for fake in fakes) >= stop_at

    left = engine.answer(
        folder, SHARDS, prompts_of, sampling, lambda n, _, found: done.update({n: found}), halted, "test", 0
    )
    return done, engine.record, left


@pytest.fixture(scope="module")
def expected(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[Response]]]:
    with serving(FakeServer(world / "model")) as fake:
        done, record, left = answer(tmp_path_factory.mktemp("expected"), [fake])
    assert not left
    assert record["answers"] == len(fake.answered) == len(set(fake.answered)) == 48
    assert record["most_in_flight"] == fake.most_at_once == 4
    assert record["seconds_waited"] > record["seconds"]
    return done


REASONS = {
    "hangs": "did not answer within 10 s",
    "dies": "cannot be reached",
    "refuses": "status 500",
    "garbles": "token ids are not all in [0, 300)",
    "another name": "status 404",
}


def spoil(fake: FakeServer, fault: str) -> None:
    """From now on."""
    if fault == "hangs":
        fake.hangs.set()
    elif fault == "dies":
        fake.lives = 0
    elif fault == "refuses":
        fake.statuses = [500] * 1000
    elif fault == "garbles":
        fake.garbles = True
    else:
        fake.name = "another"


@pytest.mark.parametrize("fault", REASONS)
def test_a_server_that_fails_is_left_out_and_named(
    world: Path, servers: Any, expected: Any, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle: the other one gives its answers, by the same seeds."""
    good, bad = servers(), servers()
    complete = FakeServer.complete

    def spoilt(self: FakeServer, body: dict[str, Any]) -> tuple[int, Any]:
        if self is bad and len(self.answered) >= 5:
            spoil(self, fault)
        return complete(self, body)

    monkeypatch.setattr(FakeServer, "complete", spoilt)
    done, record, left = answer(tmp_path, [good, bad], seconds=10.0 if fault == "hangs" else 600.0)
    assert not left
    assert done == expected
    assert record["repeated_requests"] > 0
    (named,) = record["left_out"]
    assert named.startswith(bad.url)
    assert REASONS[fault] in named
    assert not list(tmp_path.iterdir())


def test_the_last_server_that_fails_ends_the_job_and_its_answers_are_kept(
    servers: Any, expected: Any, tmp_path: Path
) -> None:
    bad, good = servers(), servers()
    bad.lives = 21
    with pytest.raises(NoServerLeft, match=r"no server is left to ask; answers so far are kept:\s+http.*cannot be"):
        answer(tmp_path, [bad])
    kept = sum(file.read_bytes().count(b"\n") for file in tmp_path.iterdir())
    assert 0 < kept < 16 + 4
    done, record, _ = answer(tmp_path, [good])
    assert len(good.answered) == record["answers"] == 48 - kept
    assert done == expected


def test_a_stop_keeps_what_was_answered(servers: Any, expected: Any, tmp_path: Path) -> None:
    fake = servers()
    done, _, left = answer(tmp_path, [fake], stop_at=20)
    assert left
    first = len(fake.answered)
    assert 20 <= first < 48
    again, record, left = answer(tmp_path, [fake])
    assert not left
    assert record["answers"] == 48 - first + 16 * len(done)  # this test's store forgets committed shards
    assert done | again == expected


def test_a_busy_server_gets_fewer_requests(servers: Any, expected: Any, tmp_path: Path) -> None:
    fake = servers()
    fake.statuses = [429, 503]
    done, record, _ = answer(tmp_path, [fake], in_flight=16)
    assert done == expected
    assert record["left_out"] == []
    assert 1 <= record["repeated_requests"] <= 2


def test_no_proxy_leads_to_servers_that_the_job_has_started(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = servers()
    monkeypatch.setenv("http_proxy", proxy.url)

    async def asked(direct: bool) -> str:
        urls = ["http://nowhere.invalid", "http://127.0.0.1:9"]
        async with ServerPool(urls, key=None, in_flight=1, request_seconds=9.0, direct=direct) as pool:
            said = []
            for server in pool.servers:
                with pytest.raises((ServerFault, ServerLost)) as raised:
                    await pool.client.post(server.url + "/v1/completions", {"model": "no"})
                said.append("proxy" if "no model" in str(raised.value) else "none")
            return " ".join(said)

    assert asyncio.run(asked(direct=False)) == "proxy none"
    assert asyncio.run(asked(direct=True)) == "none none"


@pytest.mark.parametrize(("status", "reason"), [(400, "status 400"), (500, "while other requests are answered")])
def test_a_prompt_that_no_server_answers_is_named_and_no_server_left_out(
    servers: Any, tmp_path: Path, status: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is longer than their context. Answers that are done at the same time are kept."""
    fakes = [servers(), servers()]
    complete, bad = FakeServer.complete, prompts_of(0)[3].ids

    def but_one(self: FakeServer, body: dict[str, Any]) -> tuple[int, Any]:
        return (status, {"error": "too long"}) if body["prompt"] == bad else complete(self, body)

    monkeypatch.setattr(server_pool, "REPEATS", 3)
    monkeypatch.setattr(FakeServer, "complete", but_one)
    with pytest.raises(UserError, match=rf"no server answers the prompt at p:3 \(.*{reason}") as raised:
        answer(tmp_path, fakes)
    assert not isinstance(raised.value, NoServerLeft)
    named = [fake.url in str(raised.value) for fake in fakes]
    assert all(named) if status == 400 else any(named)


def test_one_server_refuses_what_another_answers(
    servers: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, good = servers(), servers()
    complete = FakeServer.complete

    def shorter(self: FakeServer, body: dict[str, Any]) -> tuple[int, Any]:
        return (400, {"error": "too long"}) if self is short and body["prompt"][1] == 52 else complete(self, body)

    monkeypatch.setattr(FakeServer, "complete", shorter)
    done, record, _ = answer(tmp_path, [short, good])
    assert done == expected
    assert record["left_out"] == []
    assert short.answered


@pytest.mark.parametrize("back", ["the same", "another"])
def test_a_server_that_comes_back_with_another_model_is_left_out(
    world: Path, servers: Any, expected: Any, tmp_path: Path, back: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = servers(), servers()
    greedy = AnswerRequest(prompts_of(0)[0], None, 0.0, 1.0, 8, 1, good.stops, logprobs=True)
    known = Known(greedy, read_reply(good.complete(body_of(greedy, "ids", "the-model"))[1], greedy, "ids", 300), 0.01)
    worlds.write_model(tmp_path / "weights", seed=2, scale=3.0)
    weights = tmp_path / "weights" / "model.safetensors"
    away = [back == "another"]
    complete = FakeServer.complete

    def restarts(self: FakeServer, body: dict[str, Any]) -> tuple[int, Any]:
        if self is bad and len(self.answered) >= 5 and len(away) == 1:
            away.append(True)
            if away[0]:
                self.engine._model.load_state_dict(load_file(weights), strict=False)
            raise RuntimeError  # the connection ends without a reply
        return complete(self, body)

    monkeypatch.setattr(FakeServer, "complete", restarts)
    (tmp_path / "store").mkdir()
    done, record, left = answer(tmp_path / "store", [good, bad], in_flight=1, known=known)
    assert not left
    assert len(away) == 2
    assert done == expected
    assert [text.startswith(f"{bad.url}: after a time in which") for text in record["left_out"]] == [True] * away[0]
