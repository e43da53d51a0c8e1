"""Random configurations: they are taken, or refused with the user's one message; there is no third way.

`test_…_at_length` has 5,000 tries. Each fault that was found has its smallest example below as a test.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_strategies import OVERRIDES, YAML_NOISE, configurations, mostly
from fuzzing import LONG, QUICK, must_be_a_message
from hypothesis import event, given

from prefopt_dist.config import load_config, to_yaml
from prefopt_dist.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check_load(folder: Path, content: bytes, overrides: list[str]) -> str:
    """Loads, and what is saved of it loads back equal; or it is the user's mistake."""
    file = folder / "run.yaml"
    file.write_bytes(content)
    try:
        config = load_config(file, overrides)
    except UserError as error:
        must_be_a_message(error)
        return "refused"
    saved = folder / "saved.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(saved)
    assert to_yaml(again) == to_yaml(config)
    return "loaded"


CONFIGURATIONS = given(content=mostly(configurations(), YAML_NOISE), overrides=OVERRIDES)


@QUICK
@CONFIGURATIONS
def test_configurations(folder: Path, content: bytes, overrides: list[str]) -> None:
    event(check_load(folder, content, overrides))


@pytest.mark.slow
@LONG
@CONFIGURATIONS
def test_configurations_at_length(folder: Path, content: bytes, overrides: list[str]) -> None:
    event(check_load(folder, content, overrides))


RUN = "run: {dir: x}\nmodel: {name_or_path: m}\ndata: {train: d}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"": 1', ["'': unknown key"]),
        ('":": 1', ["':': unknown key"]),
        ('"a\\n\\n\\nb": 1', ["'a\\n\\n\\nb': unknown key"]),
        ("run: !!int x", ["run.yaml: ", "ValueError", "without !!tags"]),
        ("run: !!bool maybe", ["run.yaml: ", "KeyError", "without !!tags"]),
        ("run: !!timestamp x", ["run.yaml: ", "AttributeError", "without !!tags"]),
        ("run: 2001-02-30", ["run: got '2001-02-30', must be a mapping"]),
        ("run: !!map x", ["run.yaml: ", "without !!tags"]),
        ("run: " + "9" * 5000, ["run.yaml: ", "ValueError", "write plain values"]),
        ("[" * 2000, ["run.yaml: ", "RecursionError", "at most some levels deep"]),
        ('run: {dir: "a\\0b"}', ["run.dir: got 'a\\x00b'", "without NUL", "remove them"]),
        ('run: {dir: "\\ud800"}', ["run.dir: got '\\ud800'", "lone surrogates", "remove them"]),
        ('base: "a\\0b"', ["leads nowhere", "correct it"]),
        ('base: "\\ud800"', ["leads nowhere", "surrogates not allowed", "correct it"]),
        ("base: " + "x" * 5000, ["cannot be read (File name too long)"]),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_faults_found_in_configurations(folder: Path, text: str, words: list[str]) -> None:
    file = folder / "run.yaml"
    file.write_text(text if text.startswith(("run:", "[")) else RUN + text)
    with pytest.raises(UserError) as refusal:
        load_config(file)
    must_be_a_message(refusal.value)
    for word in words:
        assert word in str(refusal.value)
