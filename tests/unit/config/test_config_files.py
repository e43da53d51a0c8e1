"""Configuration: layers of files, overrides, and YAML with its mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_texts import MINIMAL, complaint, load, write

from prefopt_dist.config import DataSource, DPOLoss, SFTLoss, load_config
from prefopt_dist.config.strict_yaml import dump_yaml, load_yaml, parse_value
from prefopt_dist.errors import UserError


def test_layers_go_over_each_other(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(
        tmp_path / "inner" / "root.yaml",
        MINIMAL + "optim: {learning_rate: 1.0, eps: 1e-6, weight_decay: 1}\n",
    )
    write(tmp_path / "inner" / "middle.yaml", "base: root.yaml\noptim: {learning_rate: 2.0, eps: 1e-7}\n")
    text = "base: inner/middle.yaml\noptim: {learning_rate: 3.0}\n"
    optim = load(tmp_path, "optim.learning_rate=4", "optim.learning_rate=5", text=text).optim
    assert (optim.learning_rate, optim.eps, optim.weight_decay, optim.warmup_ratio) == (5.0, 1e-7, 1.0, 0.1)


def test_sources_and_another_loss_replace_what_is_below(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL.replace("rows.jsonl", "{path: a, weight: 3}") + "loss: {beta: 0.3}\n")
    text = "base: base.yaml\ndata: {train: {path: b}}\n"
    config = load(tmp_path, "loss.label_smoothing=0.1", text=text)
    assert config.data.train == (DataSource("b"),)
    assert config.loss == DPOLoss(beta=0.3, label_smoothing=0.1)
    assert load(tmp_path, "loss.name=sft", text=text).loss == SFTLoss()


def test_a_cycle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "other.yaml", "base: run.yaml\n")
    assert "cycle" in complaint(tmp_path, text="base: other.yaml\n")
    assert "cycle" in complaint(tmp_path, text="base: ./run.yaml\n")
    assert "does not exist" in complaint(tmp_path, text="base: none.yaml\n")
    assert "base" in complaint(tmp_path, text="base: 3\n")


@pytest.mark.parametrize("override", ["x=1", "run.seed", "run.seed =1", "=1", "run..seed=1", ".seed=1", "--check"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    assert "section.key=value" in complaint(tmp_path, override)


def test_overrides_reach_deep_and_may_not_contradict(tmp_path: Path) -> None:
    config = load(tmp_path, "tracking.wandb.mode=offline", "optim.max_grad_norm=null", "run.cache=a=b")
    assert config.tracking.wandb.mode == "offline"
    assert config.optim.max_grad_norm is None
    assert config.run.cache == "a=b"
    assert "run.seed.x=1" in complaint(tmp_path, "run.seed=1", "run.seed.x=1")
    assert "quote" not in complaint(tmp_path, "run.dir=a: b: c")


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("run: {dir: a}\nrun: {dir: b}\n", 2, "'run' stands twice"),
        ("run:\n  dir: a\n  seed: 1\n  dir: b\n", 4, "'dir' stands twice"),
        ("run:\n  dir: [a\n", 3, ""),
        ("run: {dir: a}\n\t- b\n", 2, ""),
        ("run: {1: a}\n", 1, "not a string"),
        ("a\n", 1, "mapping"),
        ("- a\n", 1, "mapping"),
        ("", 1, "nothing"),
        ("run: {dir: a}\n---\nrun: {dir: b}\n", 2, ""),
        ("run: {dir: !!python/name:os.system x}\n", 1, "constructor"),
        ("run: &x {dir: *x}\n", 1, "recursive"),
        ("run: {dir: *x}\n", 1, "alias"),
        ("a: 1\nrun: \x01\n", 2, "character"),
    ],
)
def test_yaml_mistakes_name_file_and_line(tmp_path: Path, text: str, line: int, word: str) -> None:
    message = complaint(tmp_path, text=text)
    assert message.startswith(f"{tmp_path / 'run.yaml'}:{line}:")
    assert word in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: 1\nb: é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml:2: .*UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("010", 10),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e5", 1e5),
        ("-1.5E-3", -1.5e-3),
        ("1e", "1e"),
        (".", "."),
        ("3", 3),
        ("a\u00a0é", "a\u00a0é"),
    ],
)
def test_scalars_and_their_way_back(tmp_path: Path, text: str, value: Any) -> None:
    parsed = parse_value(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)
    for stored in (value, text):  # the text as a string must come back as a string
        again = load_yaml(write(tmp_path / "back.yaml", dump_yaml({"key": stored})))["key"]
        assert again == stored
        assert type(again) is type(stored)


@pytest.mark.parametrize(
    "text",
    [
        "? !!binary " + "runr" * 2000 + "\n: 1\n",
        "x" * 900 + ": 1\n",
        "? " + "x" * 900 + "\n: 1\n? " + "x" * 900 + "\n: 2\n",
    ],
)
def test_a_monstrous_key_is_shown_in_short(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert "xxx" in str(caught.value) or "is not a string" in str(caught.value)
    assert len(str(caught.value)) < 1000
