"""generate.engine=server beside `transformers serve` itself, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import patience
import pytest
from door import Door
from generation_world import opened_world, write_run
from ports import free_port
from transformers import AutoTokenizer

NEEDED = ("fastapi", "uvicorn", "openai", "rich")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="transformers[serving] is not installed: make install",
)
FEW = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with opened_world(tmp_path_factory.mktemp("transformers-serve"), FEW) as folder:
        yield folder


@pytest.fixture(scope="module")
def url(world: Path) -> Iterator[str]:
    port, log = free_port(), world / "serve.log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu", "--port", str(port)]
    if not Path(command[0]).exists():
        command[0:1] = [sys.executable, "-m", "transformers.cli.transformers"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        try:
            return httpx2.get(address + "/health").status_code == 200
        except httpx2.HTTPError:
            return False

    patience.wait_until(process, healthy, log)
    yield address
    patience.kill_tree(process)


def answers(world: Path, cache: str) -> list[dict[str, Any]]:
    (store,) = (world / cache / "samples").iterdir()
    lines = [line for file in sorted(store.glob("samples-*")) for line in file.read_text().splitlines()[:-1]]
    return [answer for line in lines for answer in json.loads(line)]


def test_it_answers_as_the_transformers_engine_does(world: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Near temperature 0 token for token; special tokens are left out of the server's text."""
    door = Door(world, capsys)
    generate = {"prompts": str(world / "few.jsonl"), "n": 2, "temperature": 1e-3}
    asked = generate | {"engine": "server", "servers": [url], "requests_in_flight": 8}
    for cache, section in (("cache-own", generate), ("cache-served", asked)):
        door.ends(write_run(world, cache, cache=cache, generate=section), stage="generate")
    own, served = answers(world, "cache-own"), answers(world, "cache-served")
    assert len(own) == len(served) == FEW * 2
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    stops = json.loads((world / "model" / "generation_config.json").read_text())["eos_token_id"]
    bodies = [answer["ids"][:-1] if answer["ids"][-1] in stops else answer["ids"] for answer in own]
    assert [a["text"] for a in served] == [tokenizer.decode(body, skip_special_tokens=True) for body in bodies]
    assert not any(answer["exact"] for answer in served)


@pytest.mark.slow
def test_it_samples_as_asked_and_its_seeds_are_told(world: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    door = Door(world, capsys)
    section = {"prompts": str(world / "few.jsonl"), "engine": "server", "servers": [url], "requests_in_flight": 8}
    assert door.ends(write_run(world, "sampled", cache="cache-sampled", generate=section), stage="generate")[0] == 0
    facts = json.loads((world / "runs" / "sampled" / "generation.json").read_text())
    assert facts["asked"][0]["answers"] == FEW * 4
    assert len({answer["text"] for answer in answers(world, "cache-sampled")}) > FEW
