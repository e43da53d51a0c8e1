"""Sources, their bad rows, and the rows on disk."""

import gzip
import json
import os
from hashlib import blake2b
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_for_tests import ROWS, TOKENIZER, contents, lines, prepare
from huggingface_hub.errors import HfHubHTTPError
from tokenizers_for_tests import ids

from prefopt_dist.batching.order import Order
from prefopt_dist.config import DataSource
from prefopt_dist.data import open_rows, sequence_digest
from prefopt_dist.errors import UserError


def test_rows_on_disk(tmp_path: Path) -> None:
    path = lines(tmp_path / "pairs.jsonl", ROWS)
    said: list[str] = []
    seen: list[int] = []
    folder = prepare(tmp_path, path, said=said, progress=lambda done, total: seen.append(done))
    assert folder.parent == tmp_path / "cache" / "tokenised"
    assert said == [f"data.train: {path} is read as pair"]
    assert seen == [3]
    rows = open_rows(folder)
    assert (rows.kind, rows.n, rows.responses, rows.labels) == ("pair", 3, 2, None)
    frame = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert contents(rows) == [
        [
            ids(TOKENIZER, frame.format(row["prompt"])),
            ids(TOKENIZER, row["chosen"] + "<|im_end|>"),
            ids(TOKENIZER, row["rejected"] + "<|im_end|>"),
        ]
        for row in ROWS
    ]
    assert rows.lengths().sum(axis=1).tolist() == [sum(map(len, parts)) for parts in contents(rows)]
    assert rows.origin(2) == f"{path}:3"
    assert rows.digests[1, 0].tobytes() == sequence_digest(rows.prompt(1), rows.response(1, 0))
    assert [array.dtype for array in (rows.tokens, rows.offsets, rows.digests, rows.source, rows.line)] == [
        np.int32,
        np.int64,
        np.uint8,
        np.int32,
        np.int64,
    ]
    report = rows.report
    assert report.as_run_json() == {
        "rows": 3, "used": 3, "dropped": {}, "cut": {}, "repaired": {},
        "form": "pair", "digest": report.digest,
    }  # fmt: skip


def test_sequence_digest_is_fixed() -> None:
    raw = bytes([1]) + (2).to_bytes(8, "little") + b"".join(i.to_bytes(4, "little") for i in (5, 300, 7))
    assert sequence_digest([5, 300], np.array([7], np.int64)) == blake2b(raw, digest_size=16).digest()
    assert sequence_digest([5, 300], [7]) != sequence_digest([5], [300, 7])


def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path) -> None:
    plain = lines(tmp_path / "rows.json", ROWS)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    pq.write_table(table.slice(0, 2), folder / "train-00000.parquet")
    pq.write_table(table.slice(2), folder / "train-00001.parquet")
    pq.write_table(table.slice(1), folder / "test-00000.parquet")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "splits")
    expected = open_rows(prepare(tmp_path, plain))
    for source in (
        DataSource(str(packed)),
        DataSource(str(tmp_path / "rows.parquet")),
        DataSource(str(folder), split="train"),
        DataSource(str(tmp_path / "saved")),
        DataSource(str(tmp_path / "splits")),
    ):
        rows = open_rows(prepare(tmp_path, source))
        assert contents(rows) == contents(expected)
        assert rows.report.digest == expected.report.digest
        assert rows.origin(2) == f"{source.path}:3"
    assert open_rows(prepare(tmp_path, DataSource(str(tmp_path / "splits"), split="test"))).n == 1
    assert open_rows(prepare(tmp_path, DataSource(str(folder), split="test"))).n == 2


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_folder_of_other_files_is_read_as_one_source(tmp_path: Path, kind: str) -> None:
    """Beside a description; without splits in the names, all files in the order of their names."""
    expected = open_rows(prepare(tmp_path, lines(tmp_path / "rows.jsonl", ROWS)))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "dataset_infos.json").write_text('{"default": {}}')
    for number, part in enumerate((ROWS[:2], ROWS[2:])):
        if kind == "csv":
            text = pd.DataFrame(part).to_csv(index=False)
        else:
            text = json.dumps(part)
        (folder / f"part-{number}.{kind}").write_text(text)
    assert contents(open_rows(prepare(tmp_path, str(folder)))) == contents(expected)
    lines(folder / "rows.jsonl", ROWS)
    if kind == "csv":
        with pytest.raises(UserError, match=r"holds \.jsonl files and CSV files, perhaps of the same rows"):
            prepare(tmp_path, str(folder))


def test_sources_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(tmp_path / "splits")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "list.json").write_text(json.dumps(ROWS)[:-1])
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(os.urandom(2000))[:-9])
    lines(tmp_path / "rows.jsonl", ROWS)
    for name, split, message in (
        ("missing.jsonl", None, "does not exist; correct the path"),
        ("empty.jsonl", None, "holds no row"),
        ("list.json", None, "begins as a JSON list, but is not valid"),
        ("rows.txt", None, "unknown file type"),
        ("nothing", None, "neither a saved data set nor Parquet"),
        ("bad.parquet", None, "cannot be read as Parquet"),
        ("bad.jsonl.gz", None, "damaged gzip"),
        ("splits", "dev", r"no split 'dev'; choose one of \['train'\]"),
        ("rows.jsonl", "dev", "a file has no splits"),
    ):
        with pytest.raises(UserError, match=f"^data.train: .*{message}"):
            prepare(tmp_path, DataSource(str(tmp_path / name), split=split), on_bad_row="drop")
    assert not list((tmp_path / "cache" / "tokenised").glob("*")), "a failed build leaves nothing behind"

    def no_network(name: str, split: str) -> None:
        raise ConnectionError(f"cannot reach the hub for {name}")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match=r"data\.eval: 'someone/pairs'.*cannot reach the hub.*saved folder"):
        prepare(tmp_path, "someone/pairs", key="data.eval")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(ROWS))
    assert open_rows(prepare(tmp_path, "someone/pairs")).origin(0) == "someone/pairs:1"


def test_a_hub_that_refuses_is_asked_again_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub has answered, so the library goes there too, and its reason is in the message."""
    asked: list[bool] = []

    def refuse(*_: object, **__: object) -> None:
        raise HfHubHTTPError("401", response=Mock(headers={}))

    def not_found(*_: object, **__: object) -> None:
        asked.append(datasets.config.HF_HUB_OFFLINE)
        raise datasets.exceptions.DatasetNotFoundError("it does not exist on the Hub or cannot be accessed")

    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", refuse)
    monkeypatch.setattr(datasets, "load_dataset", not_found)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"data\.train: 'someone/pairs'.*does not exist on the Hub or cannot be"):
        prepare(tmp_path, "someone/pairs")
    assert asked == [False]


def test_shares_of_the_epoch_decide_the_passes(tmp_path: Path) -> None:
    """One row and four rows, half of the epoch each; a repeated preparation with other shares is another data set."""
    few, many = lines(tmp_path / "a.jsonl", ROWS[:1]), lines(tmp_path / "b.jsonl", [ROWS[0], *ROWS])
    folder = prepare(tmp_path, DataSource(few, share=2), DataSource(many, share=2))
    rows = open_rows(folder)
    assert rows.weights == pytest.approx((2.5, 0.625))
    order = Order.of_run(rows.source, rows.weights, 0, 1)
    drawn = np.concatenate([rows.source[order.epoch(epoch)] for epoch in range(20)])
    assert order.rows_per_epoch in (4, 5)
    assert 0.4 <= (drawn == 0).mean() <= 0.6
    assert prepare(tmp_path, DataSource(few, share=1), DataSource(many, share=3)) != folder
    assert open_rows(prepare(tmp_path, DataSource(few), DataSource(many))).weights == (1, 1)
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"data\.train\[1\]\.share: 3 of the rows shall come from .*c\.jsonl"):
        prepare(tmp_path, DataSource(few, share=1), DataSource(str(tmp_path / "c.jsonl"), share=3), on_bad_row="drop")


BAD_LINES = [
    (b"{", "not_json"),
    (b"[1, 2]", "not_an_object"),
    (b'{"prompt": "\xff"}', "not_utf8"),
    (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "not_utf8"),
    (b"", "blank_line"),
    (b'{"prompt": "a", "chosen": "b"}', "missing_field"),
    (b'{"prompt": "a", "chosen": "b", "rejected": true}', "wrong_type"),
    (b'{"prompt": "a", "chosen": "b<|im_end|>", "rejected": "b"}', "identical_responses"),
    (b"[" * 100_000, "not_json"),
]


def test_bad_rows_stop_or_are_counted(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    odd = good[:-1] + b', "n": ' + b"9" * 5000 + b', "n": NaN}'
    path = tmp_path / "dirty.jsonl"
    path.write_bytes(b"\n".join([odd, *(line for line, _ in BAD_LINES), good]) + b"\n\n  \n")
    rows = open_rows(prepare(tmp_path, str(path), on_bad_row="drop"))
    report = rows.report
    kinds = [kind for _, kind in BAD_LINES]
    assert report.dropped == {kind: kinds.count(kind) for kind in kinds}
    assert (report.rows, report.used) == (11, 2)
    assert [rows.origin(i) for i in range(2)] == [f"{path}:1", f"{path}:11"]
    assert report.examples["not_utf8"][1].startswith(f"{path}:5: not_utf8: ")
    assert "11 rows (pair): 2 used, 9 dropped" in report.text()
    assert f"{path}:6: blank_line" in report.text()
    for number, (line, kind) in enumerate(BAD_LINES):
        alone = tmp_path / f"{number}.jsonl"
        alone.write_bytes(b"\n".join([good, good, line, good]))
        with pytest.raises(UserError, match=rf"^.*{number}\.jsonl:3: {kind}: .*got .*data\.on_bad_row=drop$"):
            prepare(tmp_path, str(alone))


def test_the_first_bad_row_stops(tmp_path: Path) -> None:
    # Line 2 is found out only by tokenising, line 3 already by reading.
    rows = [ROWS[0], ROWS[1] | {"chosen": "a<|im_end|>b"}, {"prompt": 1}]
    with pytest.raises(UserError, match=r":2: end_token_inside"):
        prepare(tmp_path, lines(tmp_path / "rows.jsonl", rows))


def test_no_row_left_and_wrong_settings(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=r"no row is left(.|\n)*missing_field"):
        prepare(tmp_path, path, form="rated", on_bad_row="drop")
    with pytest.raises(UserError, match=r"rows.jsonl:1: missing_field: .*'label'"):
        prepare(tmp_path, path, form="rated")
    with pytest.raises(UserError, match=r"vocabulary has 10 entries; model\.tokenizer"):
        prepare(tmp_path, path, vocab_size=10)
    prepare(tmp_path, path)
    with pytest.raises(UserError, match="vocabulary has 10 entries"):
        prepare(tmp_path, path, vocab_size=10)
    for key, change in (
        ("data.format", {"form": "pairs"}),
        ("data.template", {"template": "x"}),
        ("data.on_bad_row", {"on_bad_row": "x"}),
        ("data.max_prompt_length", {"max_prompt_length": 512}),
    ):
        with pytest.raises(UserError, match=f"^{key}: "):
            prepare(tmp_path, path, **change)


def test_several_sources(tmp_path: Path) -> None:
    raw = {"prompt": "a", "chosen_response": "yes", "rejected_response": "no"}
    first, second = lines(tmp_path / "a.jsonl", ROWS), lines(tmp_path / "b.jsonl", [raw])
    rows = open_rows(prepare(tmp_path, DataSource(first, weight=0.5), DataSource(second, weight=2.0)))
    assert (rows.source.tolist(), rows.line.tolist()) == ([0, 0, 0, 1], [1, 2, 3, 1])
    assert (rows.source_names, rows.weights) == ((first, second), (0.5, 2.0))
    assert rows.report.form == "pair, raw_pair"
    assert rows.origin(3) == f"{second}:1"
    third = lines(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match="holds demonstration, other sources pair"):
        prepare(tmp_path, first, third)


def test_rated_and_demonstrations(tmp_path: Path) -> None:
    rated = [{"prompt": "a", "completion": "yes", "label": label} for label in (True, False, True)]
    rows = open_rows(prepare(tmp_path, lines(tmp_path / "rated.jsonl", rated)))
    assert (rows.kind, rows.responses) == ("rated", 1)
    assert rows.labels is not None
    assert rows.labels.tolist() == [1, 0, 1]
    shown = [{"prompt": "a", "completion": "yes"}]
    rows = open_rows(prepare(tmp_path, lines(tmp_path / "shown.jsonl", shown)))
    assert (rows.kind, rows.labels, rows.digests.shape) == ("demonstration", None, (1, 1, 16))


def test_cut_rows_are_counted(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[0] | {"chosen": "one two three " * 20}]
    report = open_rows(prepare(tmp_path, lines(tmp_path / "r.jsonl", rows), max_length=40, max_prompt_length=30)).report
    assert (report.rows, report.used, report.cut) == (2, 2, {"response": 1})
