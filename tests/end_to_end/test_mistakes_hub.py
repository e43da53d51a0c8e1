"""Names on a hub that cannot be reached or does not give: status 2, one message, at once, nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import patience
import pytest
import worlds
from door import tree
from places import REPOSITORY, TESTS

from prefopt_dist.data import sources

NAME = "somebody/private-thing"
PATIENCE = 20
"""Seconds, on a busy machine; `datasets` itself would go on for longer than that."""


class Hub(BaseHTTPRequestHandler):
    """A hub on which everything is gated: it describes a repository to everybody and gives its files to nobody."""

    status = 401
    """401 without a token, 403 with the token of somebody who has not been let in."""

    def _answer(self) -> None:
        repository = {"id": NAME, "sha": "0" * 40, "private": False, "gated": "manual", "siblings": [], "tags": []}
        describes = self.path.startswith("/api/") and "/tree/" not in self.path and "/auth-check" not in self.path
        body = json.dumps({"error": f"Access to {NAME} is restricted."} if not describes else repository).encode()
        self.send_response(200 if describes else self.status)
        if not describes:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = _answer

    def log_message(self, *_: object) -> None:
        """Not to the tests' output."""


@contextmanager
def gated_hub(status: int) -> Iterator[str]:
    """The address of a hub that answers so."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("AHub", (Hub,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    worlds.write_model(folder / "model")
    worlds.write_pairs(folder / "pairs.jsonl", 20)
    run = {"dir": str(folder / "run"), "cache": str(folder / "cache")}
    worlds.write_run(folder / "run.yaml", folder / "model", folder / "pairs.jsonl", folder / "run", run=run)
    return folder


MODELS, DATA = ("model.name_or_path", "reference.name_or_path", "model.tokenizer"), ("data.train", "data.eval")


def check_refused(folder: Path, models: list[str], data: list[str], **environment: str) -> None:
    """Each of the keys with a hub name: what is said of models and data. `inspect` reads data, `--check` models."""
    keys = [*MODELS, *DATA]
    run = str(folder / "run.yaml")
    calls = [["inspect", run, f"{k}={NAME}"] if k in DATA else ["train", run, f"{k}={NAME}", "--check"] for k in keys]
    hidden = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    before = {path for path in tree(folder) if not path.startswith(("hf", "cache"))}
    done = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "calls.py"), json.dumps(calls)],
        env={k: v for k, v in os.environ.items() if k not in hidden}
        | {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(folder / "hf"), "DS_ACCELERATOR": "cpu"}
        | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=patience.QUIET_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    for key, (status, said, seconds) in zip(keys, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert status == 2, said
        assert seconds < PATIENCE, f"{key} took {seconds:.0f} s"
        assert said.startswith(f"error: {key}: ")
        assert len(said.splitlines()) == 1, said
        for word in [f"'{NAME}'", *(data if key in DATA else models)]:
            assert word in said, f"{word!r} is not in: {said}"
    assert {path for path in tree(folder) if not path.startswith(("hf", "cache"))} == before
    assert not list(folder.glob("cache/**/.building-*"))


NO_MODEL = ["neither a local folder nor a model that the hub gave", "Check the name and the network"]
NO_DATA = ["not a local file or folder", "the hub gave no split 'train'", "correct the path", "name the saved folder"]


def test_offline(folder: Path) -> None:
    check_refused(folder, NO_MODEL, NO_DATA, HF_HUB_OFFLINE="1")


def test_no_network(folder: Path) -> None:
    check_refused(folder, NO_MODEL, NO_DATA, HF_ENDPOINT="http://127.0.0.1:9")


@pytest.mark.parametrize("status", [401, 403])
def test_gated(folder: Path, status: int) -> None:
    words = ["is gated on the hub", "set HF_TOKEN"]
    with gated_hub(status) as address:
        check_refused(folder, [*words, "Accept its licence"], [*words, "accept its terms"], HF_ENDPOINT=address)


def test_a_copy_that_is_taken_because_the_hub_is_silent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def silent(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", silent)
    before = datasets.config.HF_HUB_OFFLINE
    with (
        pytest.warns(
            UserWarning, match=r"data\.train: the hub did not answer \(ConnectionError\), so the copy of 'a/b'"
        ),
        sources._offline_if_unreachable(datasets, "a/b", "data.train"),
    ):
        assert datasets.config.HF_HUB_OFFLINE
    assert before == datasets.config.HF_HUB_OFFLINE
