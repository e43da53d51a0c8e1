"""A push to a server that speaks the hub's protocol, and to ones that refuse, fail, or never answer."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, fake_hub

from prefopt_dist.checkpoint import hub as push
from prefopt_dist.errors import UserError

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # its protocol for large files is not spoken here
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    final = tmp_path / "final"
    (final / "chat_templates").mkdir(parents=True)
    (final / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (final / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (final / "README.md").write_text("---\nlibrary_name: transformers\n---\n\nA model.\n")
    (final / "chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return final


def test_the_server_sees_the_folder(hub: FakeHub, folder: Path) -> None:
    assert push.push(folder, "someone/model") is None
    expected = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert hub.files == {"someone/model": expected}
    made = hub.made["someone/model"]
    assert made.get("private") or made.get("visibility") == "private", made
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"}
    assert [path for path in hub.unknown if "model" in path] == []
    (folder / "config.json").write_text("{}")
    assert push.push(folder, "someone/model") is None, "a repository that exists"
    assert hub.files["someone/model"]["config.json"] == b"{}"


def test_another_attempt_after_a_failure(hub: FakeHub, folder: Path) -> None:
    hub.failures = 1
    assert push.push(folder, "someone/model") is None
    assert hub.files["someone/model"].keys() >= {"README.md", "model.safetensors"}


def test_a_token_that_may_not_write(hub: FakeHub, folder: Path) -> None:
    """Tried once: it would be refused again."""
    hub.status = 401
    why = push.push(folder, "someone/model")
    assert why is not None
    assert "401" in why
    assert TOKEN not in why
    assert hub.files == {}
    assert [r for r in hub.requests if "repos/create" in r] == ["POST /api/repos/create"]


@pytest.mark.slow
def test_a_server_that_is_down(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 503
    why = push.push(folder, "someone/model")
    assert why is not None
    assert "503" in why
    assert sum("repos/create" in request for request in hub.requests) >= push.ATTEMPTS
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    why = push.push(folder, "someone/model")
    assert why is not None
    assert "Connect" in why


def test_a_server_that_hangs(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bounded time, and its process is gone."""
    monkeypatch.setattr(push, "BASE_SECONDS", 8.0)
    hub.hangs.set()
    began = time.monotonic()
    why = push.push(folder, "someone/model")
    assert why is not None
    assert "not done after 8 s" in why
    assert time.monotonic() - began < 20
    assert hub.requests, "it had asked"


@pytest.mark.parametrize("name", ["a/b/c", "with space", "-begins", "a" * 100])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UserError, match=r"export.push_to_hub: got .* must be the name of a repository"):
        push.check_name(name)


def test_names() -> None:
    push.check_name("model")
    push.check_name("someone/some-model_1.0")
