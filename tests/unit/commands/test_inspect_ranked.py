"""`inspect` on ranked rows: numbers of responses, duplicates and contradictions, rows shown; on pairs as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import planted
import pytest
import worlds
from data_for_tests import lines

from prefopt_dist.cli import main
from prefopt_dist.config import load_config
from prefopt_dist.data import open_rows
from prefopt_dist.data.derived import UnpairedRows
from prefopt_dist.data.quality.show import rows_for_report, show_rows
from prefopt_dist.errors import UserError
from prefopt_dist.setup.prepare_data import TRAIN, rows_for_loss, text_options, tokenised_train_folder


def row(prompt: str, **scores: float) -> dict[str, Any]:
    return {"prompt": prompt, "responses": list(scores), "scores": list(scores.values())}


ROWS = [
    row("a", grass=2, no=1, sky=0),
    row("a", sky=-1, no=1, grass=9),  # repeats the first
    row("a", grass=2, sky=1, no=0),  # contradicts both
    row("b", grass=2, no=1, sky=0, yes=0),
    row("b", grass=2, no=1, yes=0, sky=0),  # repeats, since the last two are equal
    row("c", grass=2, no=1, sky=0),
    row("d", grass=2, no=1),
]
HELD = [row("c", grass=2, no=1, sky=0, yes=-1), row("d", no=2, grass=1)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tokenizer = planted.write_tokenizer(tmp_path / "model")
    assert tokenizer is not None
    file = tmp_path / "run.yaml"
    held = lines(tmp_path / "held.jsonl", HELD)
    train = Path(lines(tmp_path / "train.jsonl", ROWS))
    worlds.write_run(
        file, tmp_path / "model", train, tmp_path / "run", loss={"name": "plackett_luce"},
        data={"eval": held, "max_length": 64, "max_prompt_length": 32},
    )  # fmt: skip
    return file


def test_the_report_of_ranked_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.parent / "report.json"
    assert main(["inspect", str(run), f"inspect.file={file}", "inspect.show=7"]) == 0
    said, report = capsys.readouterr().out, json.loads(file.read_text())
    train = report["data.train"]
    assert train["responses"] == {"2": 1, "3": 4, "4": 2}
    assert "responses of a row, with the number of such rows: 2: 1, 3: 4, 4: 2" in said
    found = {
        one["name"]: [e.removeprefix(str(run.parent / "train.jsonl:")) for e in one["examples"]]
        for one in train["findings"]
    }
    at = f"{run.parent / 'train.jsonl'}"
    assert found["duplicates"] == [f"2 repeats {at}:1", f"5 repeats {at}:4"]
    assert found["contradictions"] == [f"1 contradicts {at}:3", f"2 contradicts {at}:3", f"3 contradicts {at}:1"]
    assert [one.split()[0] for one in found["eval_pairs"]] == ["6", "7"]
    assert [one.split()[0] for one in found["eval_prompts"]] == ["6", "7"]
    assert set(train["lengths"]["parts"]) == {"prompt", "chosen", "rejected", "sequence", "row"}
    second = report["shown"][1]
    assert (second["scores"], len(second["responses_ids"])) == ([9, 1, -1], 3)
    assert "response 3, score -1 (" in said


def test_a_loss_on_pairs_and_kto_take_the_best_and_the_last(run: Path) -> None:
    """By the ways of `train`; KTO with split pairs: the best is desirable, the last one undesirable."""
    tokenizer = planted.write_tokenizer(run.parent / "model")
    config = load_config(run, ["loss.name=kto", "loss.split_pairs=true", "data.eval=null"])
    rows = open_rows(tokenised_train_folder(config, tokenizer, len(tokenizer)))
    assert (rows.kind, rows.responses) == ("pair", 2)
    unpaired = rows_for_loss(config, rows, TRAIN)
    assert isinstance(unpaired, UnpairedRows)
    assert [tokenizer.decode(unpaired.response(k, 0)[:-1]).strip() for k in (0, 1)] == ["grass", "sky"]
    assert unpaired.labels is not None
    assert unpaired.labels[:2].tolist() == [1, 0]
    ranked = load_config(run, ["data.eval=null"])
    rows = open_rows(tokenised_train_folder(ranked, tokenizer, len(tokenizer)))
    assert rows.responses == 4
    (of_page,) = rows_for_report(show_rows(TRAIN, rows, tokenizer, 1), rows.kind, tokenizer)
    assert [one["name"] for one in of_page["responses"]] == [f"response {k}, score {3 - k}" for k in (1, 2, 3)]
    paths = ["data.pairs_from.responses=responses", "data.pairs_from.scores=scores"]
    with pytest.raises(UserError, match=r"data\.pairs_from\.pairing: got best_random, but the loss plackett_luce"):
        text_options(load_config(run, [*paths, "data.pairs_from.pairing=best_random"]))
