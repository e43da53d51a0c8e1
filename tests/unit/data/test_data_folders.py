"""Folders as hub data sets lay them out; what Arrow adds and what it cannot read."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_for_tests import ROWS, lines, prepare
from tokenizers_for_tests import CHATML, small_tokenizer

from prefopt_dist.config import DataSource, load_config
from prefopt_dist.config.load import identity
from prefopt_dist.data import open_rows
from prefopt_dist.data.sources import open_source
from prefopt_dist.errors import UserError

README = "---\nconfigs:\n- config_name: pairs\n  data_files:\n  - split: train\n    path: a/*.parquet\n---\nA page.\n"


def write(folder: Path, *names: str) -> Path:
    """A row in each file, whose prompt is the file's name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": name, "chosen": "yes", "rejected": "no"}
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([row]), file)
        else:
            lines(file, [row])
    return folder


def taken(folder: Path, split: str | None = None, name: str | None = None) -> list[str]:
    source = open_source(DataSource(str(folder), split, name=name), 0, "data.train")
    return [row.fields["prompt"] for row in source.rows() if isinstance(row.fields, dict)]


HUB = [f"data/{split}-0000{k}-of-00002.parquet" for split in ("test_a", "train_a", "train_b") for k in (0, 1)]


def test_one_split_is_taken(tmp_path: Path) -> None:
    several = write(tmp_path / "hub", *HUB)
    with pytest.raises(UserError, match=r"no split named 'train'; name one of \['test_a', 'train_a', .*split: train_a"):
        taken(several)
    assert taken(several, "train_b") == HUB[4:]
    with pytest.raises(UserError, match=r"no split 'train'; name one of \['test_a'"):
        taken(several, "train")
    plain = write(tmp_path / "plain", "train-00000.parquet", "train-00001.parquet", "test.parquet")
    assert taken(plain) == ["train-00000.parquet", "train-00001.parquet"]
    assert taken(plain, "test") == ["test.parquet"]
    assert taken(write(tmp_path / "converted", "default/train/0000.parquet", "default/test/0000.parquet")) == [
        "default/train/0000.parquet"
    ]
    assert taken(write(tmp_path / "parts", "part-1.parquet", "part-0.parquet")) == ["part-0.parquet", "part-1.parquet"]
    with pytest.raises(UserError, match=r"has no split 'test'; remove the split"):
        taken(tmp_path / "parts", "test")
    with pytest.raises(UserError, match=r"no split named 'train'; name one of \['validation'\]"):
        taken(write(tmp_path / "held", "validation.parquet"))


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (("dpo_train.jsonl", "dpo_test.jsonl"), "['dpo_test', 'dpo_train']"),
        (("pairs-train-0.parquet", "pairs-train-1.parquet", "pairs-val-0.parquet"), "['pairs-train', 'pairs-val']"),
        (("training.jsonl", "holdout.jsonl"), "['holdout', 'training']"),
    ],
)
def test_splits_with_further_words_are_not_mixed(tmp_path: Path, names: tuple[str, ...], listed: str) -> None:
    folder = write(tmp_path / "hub", *names)
    with pytest.raises(UserError) as caught:
        taken(folder)
    assert f"no split named 'train'; name one of {listed}" in str(caught.value)
    first = listed.split("'")[3]
    assert taken(folder, first) == [name for name in names if name.startswith(first)]
    assert taken(write(tmp_path / "capitals", "Train.jsonl", "Test.jsonl")) == ["Train.jsonl"]


def test_one_configuration_is_taken(tmp_path: Path) -> None:
    folder = write(tmp_path / "hub", "en/train-00000.parquet", "zh/train-00000.parquet", "zh/test-00000.parquet")
    with pytest.raises(UserError, match=r"^data\.train: .* has the configurations \['en', 'zh'\]; name one"):
        taken(folder)
    assert taken(folder, name="zh") == ["zh/train-00000.parquet"]
    assert taken(folder, "test", "zh") == ["zh/test-00000.parquet"]
    with pytest.raises(UserError, match=r"has no configuration 'fr'; name one of \['en', 'zh'\]"):
        taken(folder, name="fr")


def test_the_readme_decides(tmp_path: Path) -> None:
    folder = write(tmp_path / "hub", "a/test.parquet", "a/x.parquet", "b/train.parquet")
    (folder / "README.md").write_text(README)
    assert taken(folder) == ["a/test.parquet", "a/x.parquet"]
    for other in ("---\n[\n---\n", "no front matter", "---\nconfigs: 3\n---\n"):
        (folder / "README.md").write_text(other)
        with pytest.raises(UserError, match=r"has the configurations \['a', 'b'\]"):
            taken(folder)


def test_folders_of_lines(tmp_path: Path) -> None:
    folder = write(tmp_path / "lines", "part-0.jsonl", "part-1.jsonl", ".cache/old.jsonl")
    assert taken(folder) == ["part-0.jsonl", "part-1.jsonl"]
    assert open_rows(prepare(tmp_path, str(folder))).origin(1) == f"{folder}:2"
    write(folder, "x.parquet")
    with pytest.raises(UserError, match=r"holds Parquet files and \.jsonl files"):
        taken(folder)


def test_a_run_without_a_configuration_of_the_data_is_the_run_of_before(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {dir: x}\nmodel: {name_or_path: m}\ndata: {train: d}\n")
    before = identity(load_config(file))
    assert {key for key in before if key.startswith("data.")} == {
        *("data.train[0].path", "data.train[0].split", "data.train[0].weight", "data.format", "data.template"),
        *("data.max_length", "data.max_prompt_length", "data.on_bad_row"),
    }
    named = identity(load_config(file, ["data.train={path: d, name: en}", "data.learn=last"]))
    assert named["data.train[0].name"] == "en"
    assert named["data.learn"] == "last"


def test_a_folder_may_lie_in_a_hidden_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.cache/pairs` and `../pairs` are read; what is hidden inside them is not. Spark's folders are no files."""
    folder = write(tmp_path / ".cache" / "pairs", "part-0.jsonl", ".old/part-1.jsonl")
    assert taken(folder) == ["part-0.jsonl"]
    (tmp_path / "here" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "work")
    assert taken(Path("../../.cache/pairs")) == ["part-0.jsonl"]
    assert taken(write(tmp_path / "spark", "data/rows.parquet/part-0.parquet"), name="rows.parquet") == [
        "data/rows.parquet/part-0.parquet"
    ]


def test_no_rows_are_left_out_silently(tmp_path: Path) -> None:
    """Files beside folders of others are a choice, and dataset_info.json alone makes no saved data set."""
    folder = write(tmp_path / "some", "a.jsonl", "more/b.jsonl")
    with pytest.raises(UserError, match=r"has the configurations \['default', 'more'\]; name one"):
        taken(folder)
    assert (taken(folder, name="default"), taken(folder, name="more")) == (["a.jsonl"], ["more/b.jsonl"])
    described = write(tmp_path / "described", "a.jsonl")
    (described / "dataset_info.json").write_text("{}")
    assert taken(described) == ["a.jsonl"]


CALLING = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for c in message.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}",
)


def calls(**arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}]


def test_nulls_of_the_schema_are_no_part_of_a_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "what?", "chosen": calls(at="sky"), "rejected": calls(x=1)},
        {"prompt": "who?", "chosen": calls(y="a", x=2), "rejected": calls(at="b")},
    ]
    tokenizer = small_tokenizer(CALLING)
    expected = open_rows(prepare(tmp_path, lines(tmp_path / "rows.jsonl", rows), tokenizer=tokenizer))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert '{"at": "sky"}' in tokenizer.decode(expected.response(0, 0))
    for name in ("rows.parquet", "saved"):
        made = open_rows(prepare(tmp_path, str(tmp_path / name), tokenizer=tokenizer))
        found = [tokenizer.decode(made.response(i, k)) for i in (0, 1) for k in (0, 1)]
        # Arrow also gives the fields of a struct one order.
        assert found == ['look{"at": "sky"}<|im_end|>', 'look{"x": 1}<|im_end|>', found[2], 'look{"at": "b"}<|im_end|>']
        assert found[2] in ('look{"x": 2, "y": "a"}<|im_end|>', 'look{"y": "a", "x": 2}<|im_end|>')


def test_what_cannot_be_read_harms_only_the_column_that_is_used(tmp_path: Path) -> None:
    far = pa.array([0, 10**18, 0], pa.timestamp("us"))
    text = pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xff\xfeb")
    )
    table = pa.Table.from_pylist(ROWS).append_column("note", text).append_column("day", far)
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = open_rows(prepare(tmp_path, str(tmp_path / "rows.parquet")))
    assert rows.n == 3
    assert rows.report.ignored[str(tmp_path / "rows.parquet")] == {"note": 3, "day": 3}
    pq.write_table(table.drop_columns(["chosen"]).append_column("chosen", text), tmp_path / "used.parquet")
    with pytest.raises(UserError, match=r"used\.parquet:2: not_utf8: chosen must be readable; got a value that cannot"):
        prepare(tmp_path, str(tmp_path / "used.parquet"))
