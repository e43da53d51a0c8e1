"""The cache folder: found again, told apart, built again when damaged."""

from pathlib import Path

import pytest
from data_for_tests import ROWS, TOKENIZER, contents, lines, prepare
from tokenizers_for_tests import small_tokenizer

from prefopt_dist.config import DataSource
from prefopt_dist.data import open_rows


def test_the_cache_is_found_and_told_apart(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", ROWS)
    folder = prepare(tmp_path, path)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    TOKENIZER("any use, truncation too", truncation=True, max_length=3)
    assert prepare(tmp_path, path) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    others = [
        prepare(tmp_path, path, tokenizer=small_tokenizer()),
        prepare(tmp_path, path, max_length=300),
        prepare(tmp_path, DataSource(path, weight=2.0)),
        prepare(tmp_path, lines(tmp_path / "rows.jsonl", ROWS[:2])),
    ]
    assert len({folder, *others}) == 5


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "manifest", "manifest_text"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, damage: str) -> None:
    path = lines(tmp_path / "rows.jsonl", ROWS)
    folder = prepare(tmp_path, path)
    expected = contents(open_rows(folder))
    tokens, manifest = folder / "tokens.bin", folder / "manifest.json"
    if damage == "flip":
        content = bytearray(tokens.read_bytes())
        content[5] ^= 1
        tokens.write_bytes(content)
    elif damage == "shorten":
        tokens.write_bytes(tokens.read_bytes()[:-4])
    elif damage == "remove":
        tokens.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"used": 3', '"used": 2'))
    else:
        manifest.write_text("{")
    said: list[str] = []
    assert prepare(tmp_path, path, said=said) == folder
    assert "damaged and will be built again" in said[0]
    assert contents(open_rows(folder)) == expected
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_the_loser_of_a_race_uses_the_folder_of_the_winner(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", ROWS)
    winner: list[Path] = []

    def race(done: int, total: int | None) -> None:
        winner.append(prepare(tmp_path, path))
        (winner[0] / "mark").touch()

    folder = prepare(tmp_path, path, progress=race)
    assert folder == winner[0]
    assert (folder / "mark").exists()
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
