"""generate.engine=server, through the door, beside a fake server that speaks the protocol."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import patience
import psutil
import pytest
import worlds
from door import Door
from fake_server import FakeJudge, FakeReward, FakeServer, serving
from generation_cases import TORCHRUN
from generation_world import PROMPTS, opened_world, write_run
from places import PYTHONPATH
from reward_models import write_reward
from serve_fake import COMMAND

from prefopt_dist.cli import main
from prefopt_dist.rollouts import server_pool
from prefopt_dist.rollouts.launched_server import LaunchedServer

FEW = 12
N = 4
CHECK = 20
"""Samples that the check asks for: two of each of eight prompts, and four of these again."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with opened_world(tmp_path_factory.mktemp("servers"), FEW) as folder:
        yield folder


@pytest.fixture
def door(world: Path, capsys: pytest.CaptureFixture[str]) -> Door:
    return Door(world, capsys)


@pytest.fixture(autouse=True)
def short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "RESTS", (0.01, 0.02, 0.04))


@pytest.fixture
def servers(world: Path) -> Iterator[Any]:
    """Starts fake servers: by default one that holds the world's model."""
    with ExitStack() as stack:

        def start(folder: str = "model", dialect: str = "ids") -> FakeServer:
            return stack.enter_context(serving(FakeServer(world / folder, dialect)))

        yield start


@pytest.fixture(scope="module")
def expected(world: Path) -> list[Any]:
    """The answers of one server that does not fail."""
    with serving(FakeServer(world / "model")) as fake:
        assert main(["generate", str(run_of(world, "expected", fake))]) == 0
    return answers(world, "expected")


def run_of(world: Path, name: str, *fakes: FakeServer, **generate: Any) -> Path:
    """A run with a cache of its own whose prompts these servers answer."""
    asked = {"engine": "server", "servers": [fake.url for fake in fakes], "prompts": str(world / "few.jsonl"), "n": N}
    return write_run(world, name, cache=f"cache-{name}", generate=asked | {"requests_in_flight": 16} | generate)


def stores(world: Path, name: str) -> list[Path]:
    return list((world / f"cache-{name}" / "samples").iterdir())


def answers(world: Path, name: str) -> list[Any]:
    (store,) = stores(world, name)
    lines = [line for file in sorted(store.glob("samples-*")) for line in file.read_text().splitlines()[:-1]]
    return [answer for line in lines for answer in json.loads(line)]


def facts(world: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / "runs" / name / "generation.json").read_text())
    return found


def job_requests(fake: FakeServer) -> list[Any]:
    """What was asked after the check."""
    return fake.answered[CHECK:]


# What a server answers


def test_token_ids_are_sampled_and_kept(world: Path, door: Door, servers: Any, expected: list[Any]) -> None:
    """Each answer is one request with a seed of its own, the same at each start; many are in flight."""
    fake = servers()
    assert door.ends(run_of(world, "ids", fake), stage="generate")[0] == 0
    found = answers(world, "ids")
    assert len(found) == FEW * N
    assert len({tuple(answer["ids"]) for answer in found}) > FEW
    assert any(answer["exact"] for answer in found)
    asked = job_requests(fake)
    assert len(asked) == len(set(asked)) == FEW * N
    assert 4 < fake.most_at_once <= 16
    (record,) = facts(world, "ids")["asked"]
    assert record["answers"] == FEW * N
    assert record["tokens"] == sum(len(answer["ids"]) for answer in found)
    assert record["seconds_waited"] > 0
    assert record["seeds_hold"]
    assert record["left_out"] == []
    assert not list((world / "cache-ids").rglob("partial-*"))
    # Another server with the same model: the same answers, since they depend on model, prompt, seed and number.
    assert found == expected
    # Stored answers are asked of no server: this one is gone.
    gone = FakeServer(world / "model")
    gone.url = "http://127.0.0.1:9"
    run = run_of(world, "ids", gone, pairing="best_random")
    (world / "runs" / "ids" / "pairs.jsonl").unlink()
    (world / "runs" / "ids" / "generation.json").unlink()
    assert door.ends(run, stage="generate")[0] == 0


def test_a_server_of_the_same_model_answers_as_transformers_does(world: Path, door: Door, servers: Any) -> None:
    """At a temperature near 0: token for token, and of text alone too, whose answers are not exact."""
    cold = {"temperature": 1e-3, "n": 2}
    for name, dialect in (("cold-ids", "ids"), ("cold-transformers", "generation_config"), ("cold-text", "strict")):
        run = run_of(world, name, servers(dialect=dialect), **cold)
        assert door.ends(run, "generate.on_bad_reward=drop", stage="generate")[0] in (0, 2)  # all answers are equal
    plain = run_of(world, "cold", **cold)
    door.ends(plain, "generate.engine=transformers", "generate.servers=[]", stage="generate")
    expected = answers(world, "cold")
    assert answers(world, "cold-ids") == expected
    for name in ("cold-transformers", "cold-text"):
        found = answers(world, name)
        assert [a["ids"][:-1] for a in found if not a["fault"]] == [a["ids"][:-1] for a in expected if not a["fault"]]
        assert [a["text"] for a in found] == [a["text"] for a in expected]
        assert not any(a["exact"] for a in found)


def test_the_key_is_sent_and_written_nowhere(
    world: Path, door: Door, servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = servers()
    fake.key = "the-secret-of-the-server"
    monkeypatch.setenv("SERVER_WORD", fake.key)
    run = run_of(world, "key", fake, key_variable="SERVER_WORD")
    status, said = door.ends(run, stage="generate")
    assert status == 0
    assert fake.keys == {f"Bearer {fake.key}"}
    monkeypatch.setenv("SERVER_WORD", "another-secret")
    status, refused = door.ends(run_of(world, "wrong-key", fake, key_variable="SERVER_WORD"), stage="generate")
    assert status == 2
    assert "status 401" in refused
    assert "Bearer ***" in refused
    written = [
        file.read_bytes() for name in ("runs", "cache-key") for file in (world / name).rglob("*") if file.is_file()
    ]
    for secret in ("the-secret-of-the-server", "another-secret"):
        assert secret not in said + refused
        assert not any(secret.encode() in content for content in written)


# Servers that are wrong


def test_another_model_is_refused_with_numbers(world: Path, door: Door, servers: Any) -> None:
    if not (world / "other").exists():
        shutil.copytree(world / "model", world / "other")
        worlds.write_model(world / "other-weights", seed=2, scale=3.0)
        shutil.copy(world / "other-weights" / "model.safetensors", world / "other")
    fake = servers("other")
    status, said = door.ends(run_of(world, "other", servers(), fake), stage="generate")
    assert status == 2
    assert f"generate.servers: {fake.url} holds another model than {world / 'model'}" in said
    assert "whose log-prob under this model is -" in said
    assert "tolerance: at most 0.01 nats" in said


def test_a_slightly_other_model_is_seen_by_its_log_probs(world: Path, door: Door, servers: Any) -> None:
    from safetensors.torch import load_file, save_file

    near = world / "near"
    shutil.copytree(world / "model", near, dirs_exist_ok=True)
    weights = load_file(near / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.05  # the most likely tokens stay the same
    save_file(weights, near / "model.safetensors", metadata={"format": "pt"})
    status, said = door.ends(run_of(world, "near", servers("near")), stage="generate")
    assert status == 2
    assert "its log-probs of" in said
    assert "nats on average" in said


@pytest.mark.parametrize("behaviour", ["greedy", "temperature"])
def test_a_server_that_ignores_the_temperature_is_refused(
    world: Path, door: Door, servers: Any, behaviour: str
) -> None:
    fake = servers(dialect="generation_config" if behaviour == "greedy" else "ids")
    setattr(fake, behaviour, True if behaviour == "greedy" else 3.0)
    asked = 0.9 if behaviour == "greedy" else 0.2
    status, said = door.ends(run_of(world, behaviour, fake, temperature=asked), stage="generate")
    assert status == 2
    assert f"are not samples at generate.temperature {asked}" in said
    assert ("do_sample: true" if behaviour == "greedy" else "less likely tokens") in said


def test_a_server_with_too_short_a_context_is_left_out_before_the_first_prompt(
    world: Path, door: Door, servers: Any
) -> None:
    fake = servers()
    fake.longest = 20
    status, said = door.ends(run_of(world, "short", fake), stage="generate")
    assert status == 2
    assert "it takes at most 20 tokens (max_model_len), and the prompt at " in said
    assert not fake.answered


def test_seeds_that_do_not_hold_are_said(world: Path, servers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake = servers()
    fake.forgets_seeds = True
    assert main(["generate", str(run_of(world, "seedless", fake))]) == 0
    assert "seeds do not hold in company (" in capsys.readouterr().out
    assert facts(world, "seedless")["asked"][0]["seeds_hold"] is False


# Servers that fail


def test_a_job_without_servers_ends_and_goes_on_with_another(
    world: Path, door: Door, servers: Any, expected: list[Any]
) -> None:
    """Status 2 with the reason; the answers before it are not asked for again."""
    bad, good = servers(), servers()
    bad.lives = CHECK + 9
    status, said = door.ends(run_of(world, "replaced", bad), stage="generate")
    assert status == 2
    assert "generate.servers: no server is left to ask; answers so far are kept:" in said
    assert f"{bad.url}: it cannot be reached" in said
    kept = "".join(file.read_text() for file in (world / "cache-replaced").rglob("partial-*")).splitlines()
    assert 0 < len(kept) < FEW * N
    assert door.ends(run_of(world, "replaced", good), stage="generate")[0] == 0
    assert len(job_requests(good)) == FEW * N - len(kept)
    assert answers(world, "replaced") == expected
    first, second = facts(world, "replaced")["asked"]
    assert first["left_out"]
    assert second["answers"] == FEW * N - len(kept)


def test_a_killed_job_asks_nothing_twice(world: Path, door: Door, servers: Any, expected: list[Any]) -> None:
    """SIGKILL among single answers of the first shard; then the same command."""
    fake = servers()
    run = run_of(world, "killed", fake, requests_in_flight=2)
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN} | {"PYTHONPATH": PYTHONPATH}
    process = subprocess.Popen([sys.executable, "-m", "prefopt_dist", "generate", str(run)], env=environment)

    def some() -> bool:
        return any(file.read_bytes().count(b"\n") > 9 for file in (world / "cache-killed").rglob("partial-*"))

    patience.wait_until(process, some, world / "cache-killed")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (file,) = (world / "cache-killed").rglob("partial-*")
    kept = file.read_bytes().count(b"\n")
    assert 9 < kept < FEW * N
    while fake.at_once:  # it does not know yet that the job is dead
        time.sleep(0.05)
    first = job_requests(fake)
    fake.answered = []
    with file.open("ab") as torn:
        torn.write(b"[0, 0, [1, 2")  # a line that the kill cut off
    assert door.ends(run, stage="generate")[0] == 0
    second = job_requests(fake)
    assert len(second) == FEW * N - kept
    again = set(first) & set(second)
    assert len(again) <= 2  # those in flight at the kill
    assert set(first) | set(second) == set(first + second)
    assert answers(world, "killed") == expected


@pytest.mark.slow
def test_two_ranks_ask_for_each_answer_once(world: Path, servers: Any) -> None:
    fake = servers()
    run = run_of(world, "ranks", fake, prompts=str(world / "prompts.jsonl"), n=2)
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN} | {"PYTHONPATH": PYTHONPATH}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen([*torchrun, "-m", "prefopt_dist", "generate", str(run)], env=environment)
    done = world / "runs" / "ranks" / "pairs.jsonl"
    patience.wait_until(process, done.exists, world / "cache-ranks")
    assert process.wait() == 0
    asked = job_requests(fake)
    assert len(asked) == len(set(asked)) == len(answers(world, "ranks")) == PROMPTS * 2
    (record,) = facts(world, "ranks")["asked"]
    assert record["answers"] == PROMPTS * 2
    assert fake.most_at_once <= 16


def test_the_job_starts_a_server_and_ends_it(
    world: Path, door: Door, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the environment names a proxy, which does not lead to this machine."""
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("MASTER_KEY", "a variable that is not the launcher's")
    run = run_of(world, "launched", launch={"command": COMMAND})
    assert door.ends(run, stage="generate")[0] == 0
    assert answers(world, "launched") == expected
    said = (world / "runs" / "launched" / "server-generate.log").read_text()
    assert f"serving {world / 'model'} ['MASTER_KEY']" in said
    (file,) = world.glob("child-of-*")
    assert not psutil.pid_exists(int(file.read_text()))


def test_a_stop_ends_the_wait_for_a_server_that_is_not_healthy_yet(
    world: Path, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"{sys.executable} -c 'import time; time.sleep(600)' {{model}} {{port}}"
    run = run_of(world, "stopped", launch={"command": command, "start_seconds": 60})
    is_healthy = LaunchedServer._is_healthy

    def asks(self: LaunchedServer) -> bool:
        (world / "runs" / "stopped" / "STOP").touch()
        return is_healthy(self)

    monkeypatch.setattr(LaunchedServer, "_is_healthy", asks)
    assert door.ends(run, stage="generate") == (0, "")
    assert "while generating" in (world / "runs" / "stopped" / "STOPPED").read_text()


# Mistakes


def test_mistakes_about_servers(world: Path, door: Door) -> None:
    run = write_run(world, "mistakes-of-servers", generate={"engine": "server"})
    for words, overrides in [
        (["generate.servers: not set"], []),
        (["generate.servers[0]: got 'node1:8000'", "http://node1:8000"], ["generate.servers=['node1:8000']"]),
        (["generate.servers[0]: got 'http://[::1'", "http://node1:8000"], ["generate.servers=['http://[::1']"]),
        (["generate.servers[0]: got 'http://node1:abc'"], ["generate.servers=['http://node1:abc']"]),
        (["generate.servers[0]: got 'http://node 1'"], ["generate.servers=['http://node 1']"]),
        (
            ["generate.launch.command: got", "must be words as a shell splits them"],
            ["generate.launch={command: 'x \"{model} {port}'}"],
        ),
        (["generate.servers[0]: has a name or password"], ["generate.servers=['http://me:word@node1']"]),
        (
            ["generate.key_variable: the environment variable NO_SUCH"],
            ["generate.servers=['http://node1']", "generate.key_variable=NO_SUCH"],
        ),
        (
            ["generate.servers: got 'http://node1'", "generate.engine=server"],
            ["generate.servers=['http://node1']", "generate.engine=transformers"],
        ),
        (
            ["generate.launch.command: got 'serve'", "must have the word {model}"],
            ["generate.launch={command: serve}"],
        ),
        (
            ["generate.launch: got 'x {model} {port}' beside generate.servers"],
            ["generate.launch={command: 'x {model} {port}'}", "generate.servers=['http://node1']"],
        ),
        (["generate.engine: got 'vllm'", "generate.engine=server"], ["generate.engine=vllm"]),
    ]:
        door.fails(words, *overrides, stage="generate", run=run, early=True)


def test_secrets_stay_out_of_commands_and_messages(world: Path, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(world, "secrets-of-servers", generate={"engine": "server"})
    for option in ("--api-key planted", "--api-key=planted", "--hf-token planted"):
        launch = f"generate.launch={{command: 'serve {{model}} {{port}} {option}'}}"
        said = door.fails(["command: has a secret after --"], launch, stage="generate", run=run, early=True)
        assert "planted" not in said
    for planted in ("planted\nword", "plantéd"):
        monkeypatch.setenv("SERVER_WORD", planted)
        overrides = ["generate.servers=['http://node1']", "generate.key_variable=SERVER_WORD"]
        said = door.fails(["SERVER_WORD has a line end"], *overrides, stage="generate", run=run, early=True)
        assert "plant" not in said


# Judges


def judge_of(world: Path, fake: FakeJudge) -> dict[str, Any]:
    (world / "judge.txt").write_text("{prompt}\n<<{first}>>\n<<{second}>>\nEnd with first, second or tie.")
    return {"judge": {"server": fake.url, "model": "m", "prompt": str(world / "judge.txt")}}


def test_a_judge_makes_pairs_by_what_it_prefers_in_both_orders(world: Path, door: Door) -> None:
    def more_letters(first: str, second: str) -> str:
        a, b = (sum(c.islower() for c in text) for text in (first, second))
        return "first" if a > b else "second" if b > a else "tie"

    few = {"prompts": str(world / "few.jsonl")}
    with serving(FakeJudge(more_letters)) as fake:
        run = write_run(world, "judged", cache="cache-judged", generate=few | {"rewards": [judge_of(world, fake)]})
        assert door.ends(run, stage="generate")[0] == 0
        # Models are compared by the other rewards alone.
        words = ["generate.rewards: has judges alone", "function or a model too"]
        door.fails(words, f"evaluate.prompts={world / 'few.jsonl'}", stage="rounds", run=run, early=True)
    pairs = [json.loads(line) for line in (world / "runs" / "judged" / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    for row in pairs:
        assert sum(c.islower() for c in row["chosen"]) > sum(c.islower() for c in row["rejected"])
    counts = facts(world, "judged")["judged"]
    assert 2 * counts["comparisons"] == len(fake.answered)
    assert counts["orders_disagree"] == counts["unreadable"] == 0
    assert counts["tokens"] == 100 * len(fake.answered)


def test_a_judge_that_prefers_the_first_answer_changes_nothing_and_this_is_said(world: Path, door: Door) -> None:
    few = {"prompts": str(world / "few.jsonl")}
    with serving(FakeJudge(lambda first, second: "first")) as fake:
        run = write_run(world, "biased", cache="cache-judged", generate=few | {"rewards": [judge_of(world, fake)]})
        (world / "judge.txt").write_text((world / "judge.txt").read_text() + "\n")  # another question: other scores
        status, said = door.ends(run, stage="generate")
    assert status == 2
    assert "no pair is left of 12 prompts" in said
    assert "All are ties, so the judge decides nothing: it takes whatever is shown first" in said


# Reward models


def test_a_served_reward_model_makes_the_pairs_of_a_local_one(world: Path, door: Door) -> None:
    reward = write_reward(world / "reward")

    def made(name: str, source: dict[str, Any]) -> list[tuple[str, str]]:
        generate = {"prompts": str(world / "few.jsonl"), "rewards": [source]}
        run = write_run(world, name, cache="cache-rewarded", generate=generate)
        assert door.ends(run, stage="generate")[0] == 0
        rows = (world / "runs" / name / "pairs.jsonl").read_text().splitlines()
        return [(row["chosen"], row["rejected"]) for row in map(json.loads, rows)]

    local = made("rewarded", {"model": str(reward)})
    with serving(FakeReward(reward)) as fake:
        server = {"url": fake.url, "model": fake.name, "folder": str(reward)}
        assert made("served", {"server": server}) == local
        asked = len(fake.answered)
        # Beside another reward too, nothing is asked for again, but for the check.
        run = write_run(
            world,
            "served-too",
            cache="cache-rewarded",
            generate={
                "prompts": str(world / "few.jsonl"),
                "rewards": [{"server": server}, {"function": "rewards_for_tests:letters"}],
            },
        )
        assert door.ends(run, stage="generate")[0] == 0
        assert len(fake.answered) == asked + 6
    assert local
    for words, source in [
        (["generate.rewards[0].server.url: got 'node1'"], server | {"url": "node1"}),
        (["generate.rewards[0].server.folder", "is a LlamaForCausalLM"], server | {"folder": str(world / "model")}),
    ]:
        few = {"prompts": str(world / "few.jsonl"), "rewards": [{"server": source}]}
        door.fails(words, stage="generate", run=write_run(world, "served-wrong", generate=few), early=True)
