"""`inspect`: every kind of fault found exactly, by count and line; policies; what is written."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import worlds
from data_for_tests import lines, prepare
from tokenizers_for_tests import INST, small_tokenizer

from prefopt_dist import data
from prefopt_dist.cli import main
from prefopt_dist.config import load_config
from prefopt_dist.data import TokenisedRows, open_rows
from prefopt_dist.data.dataset import flag_bits
from prefopt_dist.data.quality import findings
from prefopt_dist.data.quality.findings import DataFinding, first_of_group, group_equal, row_findings, set_findings
from prefopt_dist.data.quality.policy import ADVICE
from prefopt_dist.errors import UserError
from prefopt_dist.setup.prepare_data import tokenised_train_folder

ROW_KINDS = (
    "duplicates contradictions eval_pairs eval_prompts cut_prompt cut_response unfair_cut missing_bos missing_end "
    "double_bos double_end stray_special lost_reasoning lost_prompt other_prompt"
).split()


class World:
    """The planted files and a run of them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.planted = planted.plant()
        self.train, self.held = self.planted.write(folder)
        self.tokenizer = planted.write_tokenizer(folder / "model")
        self.file = folder / "run.yaml"
        worlds.write_run(
            self.file, folder / "model", self.train, folder / "run",
            data={"eval": str(self.held), "max_length": planted.MAX_LENGTH, "max_prompt_length": planted.MAX_PROMPT},
        )  # fmt: skip

    def inspect(self, *overrides: str) -> tuple[int, str, str]:
        """Exit status, what was printed, what went to stderr."""
        self.capsys.readouterr()
        status = main(["inspect", str(self.file), *overrides])
        return status, *self.capsys.readouterr()

    def report(self, *overrides: str) -> dict[str, Any]:
        """What the JSON file says of a call that ends with 0."""
        file = self.folder / "report.json"
        assert self.inspect(f"inspect.file={file}", "data.on_bad_row=drop", *overrides)[0] == 0
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def train_rows(self, *overrides: str) -> TokenisedRows:
        """What training reads."""
        config = load_config(str(self.file), ["data.on_bad_row=drop", *overrides])
        return open_rows(tokenised_train_folder(config, self.tokenizer, len(self.tokenizer)))

    def origins(self, kind: str, count: int | None = None) -> list[str]:
        """file:line of a planted kind."""
        return [f"{self.train}:{line}" for line in self.planted.at[kind][:count]]


@pytest.fixture
def world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> World:
    return World(tmp_path, capsys)


def test_every_planted_fault_is_found(world: World) -> None:
    report = world.report()
    assert report.keys() == {"data.train", "data.eval"}
    found = {told["name"]: told for told in report["data.train"]["findings"]}
    at = world.planted.at
    assert len(at) == 24
    assert {name: told["count"] for name, told in found.items() if told["count"]} == {
        **{kind: len(where) for kind, where in at.items()},
        "few_rows": 1,
    }
    for kind, where in at.items():
        shown = [example.split(" ")[0].rstrip(":") for example in found[kind]["examples"]]
        assert shown == world.origins(kind, 3), kind
        assert len(where) <= 4
    assert {*ROW_KINDS, "few_rows", "length_bias"} <= found.keys()
    train, good = world.train, f"repeats {world.train}:1|repeats {world.train}:8|repeats {world.train}:1".split("|")
    assert [example.partition(" ")[2] for example in found["duplicates"]["examples"]] == good
    first, second, *_ = world.origins("contradictions")
    assert found["contradictions"]["examples"][:2] == [f"{first} contradicts {second}", f"{second} contradicts {first}"]
    assert found["eval_pairs"]["examples"][1].endswith(f"is also in {world.held}:5")
    assert found["eval_prompts"]["examples"][2].endswith(f"has the prompt of {world.held}:4")
    counts = report["data.train"]["counts"]
    assert counts["rows"] == len(world.planted.lines) == counts["used"] + sum(counts["dropped"].values())
    assert report["data.train"]["cut_responses"] == {"chosen only": 1, "rejected only": 1, "both": 1}
    assert str(train) in counts["examples"]["not_utf8"][0]
    held = {told["name"]: told["count"] for told in report["data.eval"]["findings"]}
    assert {name for name, count in held.items() if count} == {"few_rows"}
    assert "eval_pairs" not in held, "a set does not overlap with itself"


def test_the_text_names_each_finding_with_its_remedy(world: World) -> None:
    status, said, _ = world.inspect("data.on_bad_row=drop")
    assert status == 0
    for kind, where in world.planted.at.items():
        assert f"  {len(where)} {kind} (" in said
        assert ADVICE[kind][0] in said
        assert f"    → {ADVICE[kind][1]}" in said
    assert "verdict: can be used; look first at duplicates, contradictions, eval_pairs" in said
    assert "left out: missing_field, " in said
    assert "  truncated responses: chosen only 1, rejected only 1, both 1; both responses of each pair" in said
    assert "  the longer response is chosen in " in said
    for part in ("prompt", "chosen", "rejected", "sequence"):
        assert part in said
    assert "█" in said


def test_a_stop_alone_ends_with_two(world: World) -> None:
    at = world.planted.at
    first = min(line for kind, where in at.items() if kind not in ROW_KINDS for line in where)
    status, said, message = world.inspect()
    assert status == 2
    assert f"error: {world.train}:{first}: not_json: " in message
    assert "leave such rows out with data.on_bad_row=drop" in message
    assert f"  {len(at['prompts_differ'])} prompts_differ (data.on_bad_row=stop)" in said, "the first hides no other"
    assert "verdict: stop, because of missing_field, " in said

    for name, kinds in (("duplicates", "3 duplicates"), ("cut", "2 cut_prompt"), ("few_rows", "fewer than 10,000")):
        status, said, message = world.inspect("data.on_bad_row=drop", f"inspect.{name}=stop")
        assert (status, f"error: inspect.{name}: got stop" in message, kinds in message) == (2, True, True)
        assert "verdict: stop, because of " in said
        assert len(message.splitlines()) <= 2
        with pytest.raises(UserError, match=rf"^inspect\.{name}: got stop"):
            world.train_rows(f"inspect.{name}=stop")
    # Looked for and not there.
    assert world.inspect("data.on_bad_row=drop", "inspect.length_bias=stop", "inspect.label_balance=stop")[0] == 0


def test_training_drops_what_inspect_says(world: World) -> None:
    every = world.train_rows()
    at = world.planted.at
    for names, kinds in (
        (["duplicates"], ["duplicates"]),
        (["contradictions", "eval_prompts"], ["contradictions", "eval_prompts"]),
        (["cut", "special_tokens"], ["cut_prompt", "cut_response", "double_end", "stray_special"]),
    ):
        overrides = [f"inspect.{name}=drop" for name in names]
        rows = world.train_rows(*overrides)
        gone = {line for kind in kinds for line in at[kind]}
        kept = [i for i in range(every.n) if int(every.line[i]) not in gone]
        assert rows.line.tolist() == every.line[kept].tolist()
        for k, i in enumerate(kept):
            assert rows.prompt(k).tolist() == every.prompt(i).tolist()
            assert [rows.response(k, s).tolist() for s in (0, 1)] == [every.response(i, s).tolist() for s in (0, 1)]
        assert np.array_equal(rows.digests, every.digests[kept])
        assert np.array_equal(rows.flags, every.flags[kept])
        report = rows.report
        assert report.dropped == every.report.dropped | {kind: len(at[kind]) for kind in kinds}
        assert report.rows == report.used + sum(report.dropped.values()) == every.report.rows
        assert report.digest != every.report.digest
        assert report.cut == ({} if "cut" in names else {"prompt": 2, "response": 3})
        assert world.train_rows(*overrides).report == report
        status, said, _ = world.inspect("data.on_bad_row=drop", *overrides)
        assert (status, all(f"{kind} (inspect." in said for kind in kinds)) == (0, True)
    with pytest.raises(UserError, match=r"^data\.train: no row is left when eval_prompts are dropped"):
        world.train_rows(f"data.eval={world.train}", "inspect.eval_prompts=drop")


def test_a_set_as_a_whole_is_what_the_drops_leave(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row too few only when the three duplicates are gone; a bias that is theirs alone goes with them."""
    every = world.train_rows().n
    monkeypatch.setattr(findings, "FEW_ROWS", every - 2)
    few = "data.on_bad_row=drop", "inspect.few_rows=stop"
    assert world.inspect(*few)[0] == 0
    status, _, message = world.inspect(*few, "inspect.duplicates=drop")
    assert (status, f"{every - 3:,} rows, fewer than {every - 2:,}" in message) == (2, True)
    with pytest.raises(UserError, match=r"^inspect\.few_rows: got stop"):
        world.train_rows("inspect.few_rows=stop", "inspect.duplicates=drop")

    again = planted.pair("what is long?", chosen="grass grass", rejected="grass")
    world.train.write_text("".join(json.dumps(row) + "\n" for row in [again] * 40) + world.held.read_text())
    biased = "inspect.length_bias=stop", f"data.eval={world.train}"
    assert world.inspect(*biased)[0] == 2
    assert world.inspect(*biased, "inspect.duplicates=drop")[0] == 0
    assert world.report(f"data.eval={world.train}", "inspect.duplicates=drop")["data.train"]["longer_chosen"][
        "longer"
    ] == 1  # fmt: skip
    assert world.train_rows(*biased, "inspect.duplicates=drop").n == 6


def test_one_tokenised_folder_for_inspect_and_train(tmp_path: Path) -> None:
    good = [{"prompt": f"what is {k}?", "chosen": "yes", "rejected": "no"} for k in range(3)]
    path = lines(tmp_path / "good.jsonl", good)
    assert prepare(tmp_path, path, on_bad_row="drop") == prepare(tmp_path, path, on_bad_row="stop")
    bad = lines(tmp_path / "bad.jsonl", [*good, {"prompt": 1}, {"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(UserError) as fresh:
        prepare(tmp_path, bad, on_bad_row="stop")
    prepare(tmp_path, bad, on_bad_row="drop")
    with pytest.raises(UserError, match=r"bad\.jsonl:4: wrong_type") as cached:
        prepare(tmp_path, bad, on_bad_row="stop")
    assert str(fresh.value) == str(cached.value)


def found_in(
    tmp_path: Path, rows: list[dict[str, Any]], held: list[dict[str, Any]] | None = None
) -> dict[str, DataFinding]:
    def opened(name: str, some: list[dict[str, Any]]) -> TokenisedRows:
        return open_rows(prepare(tmp_path, lines(tmp_path / name, some)))

    train = opened("train.jsonl", rows)
    evals = {} if held is None else {"data.eval": opened("eval.jsonl", held)}
    return {
        f.name: f for f in [*row_findings(train, evals), *set_findings(train, (1.0, 1.0), np.ones(train.n, dtype=bool))]
    }


def test_rated_rows(tmp_path: Path) -> None:
    def row(prompt: str, label: bool) -> dict[str, Any]:
        return {"prompt": prompt, "completion": "grass", "label": label}

    rows = [row("a", True), row("b", True), row("a", False), row("b", True), row("a", True), row("c", True)]
    held = [{"prompt": "c", "chosen": "grass", "rejected": "sky"}, {"prompt": "b", "chosen": "x", "rejected": "y"}]
    found = found_in(tmp_path, rows, held)
    assert found["contradictions"].rows.tolist() == [0, 2, 4]
    assert found["duplicates"].rows.tolist() == [3, 4]
    assert found["eval_pairs"].rows.tolist() == [5]
    assert found["eval_prompts"].rows.tolist() == [1, 3, 5]
    balance = found["label_balance"]
    assert (balance.count, len(balance.rows)) == (1, 0)
    assert balance.examples == (
        "5 rows of label true (weight 1), 1 of false (weight 1); weighted, 5.00 to 1",
    )  # fmt: skip
    train = open_rows(prepare(tmp_path, str(tmp_path / "train.jsonl")))
    assert (
        next(f for f in set_findings(train, (1.0, 4.0), np.ones(6, dtype=bool)) if f.name == "label_balance").count == 0
    )


@pytest.mark.parametrize(
    ("longer", "shorter", "biased"), [(60, 40, 0), (61, 39, 0), (70, 30, 1), (20, 80, 1), (3, 0, 0)]
)
def test_length_bias(tmp_path: Path, longer: int, shorter: int, biased: int) -> None:
    rows = [{"prompt": f"{k}", "chosen": "grass grass", "rejected": "grass"} for k in range(longer)]
    rows += [{"prompt": f"{k}", "chosen": "grass", "rejected": "grass no"} for k in range(longer, longer + shorter)]
    rows += [{"prompt": f"{k}", "chosen": "yes", "rejected": "no"} for k in range(200, 210)]
    finding = found_in(tmp_path, rows)["length_bias"]
    assert finding.count == biased
    n = longer + shorter
    told = f"chosen in {longer / n:.1%} of {n} pairs of different length", f"right in {(longer + 5) / (n + 10):.1%} of"
    assert all(part in finding.examples[0] for part in told)


def test_the_distribution_of_weights_and_margins(world: World) -> None:
    """Only where the keys name columns; in the text and in the JSON file."""
    rows = [json.loads(line) for line in Path(worlds_pairs(world)).read_text().splitlines()]
    given = lines(world.folder / "weighted.jsonl", [row | {"w": k % 3, "m": -1.5} for k, row in enumerate(rows)])
    options = (f"data.train={given}", "data.eval=null")
    assert world.report(*options)["data.train"]["numbers"] == {}
    found = world.report(*options, "data.weight=w", "data.margin=m")["data.train"]["numbers"]
    assert found["data.weight"]["zeros"] == 4
    assert found["data.margin"] == {
        "mean": -1.5, "quantiles": dict.fromkeys(("0", "5", "50", "95", "100"), -1.5), "zeros": 0, "negative": 12,
    }  # fmt: skip
    _, text, _ = world.inspect(*options, "data.weight=w", "data.margin=m", "data.on_bad_row=drop")
    assert "  data.weight: mean 1, 0 % 0, 5 % 0, 50 % 1, 95 % 2, 100 % 2; 4 rows with 0, 0 below" in text


def worlds_pairs(world: World) -> str:
    """A file of twelve good pairs."""
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    rows = [{"prompt": w, "chosen_response": f"{w} yes", "rejected_response": f"{w} no"} for w in words]
    return lines(world.folder / "twelve.jsonl", rows)


def test_special_tokens_of_strings_that_carry_the_template(tmp_path: Path) -> None:
    inst = small_tokenizer(INST)
    prompts = ["<s>[INST] a [/INST]", "[INST] b [/INST]", "<s><s>[INST] c [/INST]", "<s>[INST] d<|im_end|> [/INST]"]
    rows = [{"prompt": prompt, "chosen": "yes</s>", "rejected": "no</s>"} for prompt in prompts]
    rows.append({"prompt": "<s>[INST] e [/INST]", "chosen": "yes</s>", "rejected": "no"})
    folder = prepare(tmp_path, lines(tmp_path / "rows.jsonl", rows), tokenizer=inst)
    found = {f.name: f.rows.tolist() for f in row_findings(open_rows(folder), {})}
    assert [found[k] for k in "missing_bos missing_end double_bos double_end stray_special".split()] == [
        [1], [4], [2], [], [3],
    ]  # fmt: skip


def test_an_unfair_cut_would_be_found(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "yes", "rejected": "no " * k} for k in (1, 9, 9)]
    made = open_rows(prepare(tmp_path, lines(tmp_path / "rows.jsonl", rows)))
    first, second = (flag_bits([f"cut_response_{k}"]) for k in (0, 1))
    made = replace(made, flags=np.array([0, second, first | second], dtype=np.uint16))
    found = {f.name: f.rows.tolist() for f in row_findings(made, {})}
    assert (found["cut_response"], found["unfair_cut"]) == ([1, 2], [2])


def test_every_fault_has_its_advice() -> None:
    sources = "".join(file.read_text() for file in Path(data.__file__).parent.glob("*.py"))
    kinds = set(re.findall(r'BadRow\(\s*"(\w+)"', sources))
    assert len(kinds) >= 19
    assert kinds <= ADVICE.keys()
    assert {*ROW_KINDS, "few_rows", "length_bias", "label_balance"} == ADVICE.keys() - kinds


def test_equal_rows_as_a_dictionary_finds_them() -> None:
    draw = np.random.default_rng(0)
    for n, values in ((1, 1), (50, 3), (400, 30)):
        keys = draw.integers(0, values, (n, 4)).astype(np.uint64)
        others = draw.integers(0, values, (n // 2, 4)).astype(np.uint64)
        first: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key.tobytes(), i)
        groups = group_equal(keys)
        assert [int(groups.first[g]) for g in groups.of] == [first[key.tobytes()] for key in keys]
        known: dict[bytes, int] = {}
        for i, key in enumerate(others):
            known.setdefault(key.tobytes(), i)
        assert first_of_group(keys, others).tolist() == [known.get(key.tobytes(), -1) for key in keys]


def test_names_of_a_field_are_counted(world: World) -> None:
    rows = [
        json.loads(line) | {"source": "web" if k % 3 else "books"} for k, line in enumerate(world.planted.lines[:40])
    ]
    world.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert world.report()["data.train"]["counts"]["named"] == {"source": {"web": 26, "books": 14}}
    assert "  source: web 26, books 14\n" in world.inspect()[1]
    many = [row | {"source": f"https://example.org/{k}"} for k, row in enumerate(rows * 5)]
    world.train.write_text("".join(json.dumps(row) + "\n" for row in many))
    counted = world.report()["data.train"]["counts"]["named"]["source"]
    assert (len(counted), counted["(others)"], sum(counted.values())) == (101, 100, 200)


def test_the_picture(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = world.folder / "lengths.png"
    status, said, _ = world.inspect("data.on_bad_row=drop", f"inspect.picture={picture}")
    assert (status, f"drawn: {picture}" in said) == (0, True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    status, _, message = world.inspect("data.on_bad_row=drop", f"inspect.picture={world.folder}/no/lengths.png")
    assert (status, "inspect.picture: " in message, "cannot be written" in message) == (2, True, True)
    status, _, message = world.inspect("inspect.picture=lengths.txt")
    assert (status, ".png, .svg or .pdf" in message) == (2, True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, said, message = world.inspect("data.on_bad_row=drop", f"inspect.picture={picture}")
    assert (status, said) == (2, ""), "found before the data are read"
    assert "pip install matplotlib" in message
    assert world.inspect("data.on_bad_row=drop")[0] == 0


def test_the_report_that_cannot_be_written(world: World) -> None:
    status, _, message = world.inspect("data.on_bad_row=drop", f"inspect.file={world.folder}/no/report.json")
    assert (status, "inspect.file: " in message, "Choose a folder that exists" in message) == (2, True, True)


def test_rows_are_shown_as_the_model_sees_them(world: World) -> None:
    row = planted.pair("what is long?", chosen="grass\ngrass", rejected="grass") | {"note": "x", "empty": None}
    world.train.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    report = world.report("inspect.show=1")
    first, held = report["shown"]
    assert (first["set"], held["set"]) == ("data.train", "data.eval")
    assert first.keys() == set(
        "set origin prompt_ids responses_ids learnt prompt_text responses_text cut ignored_columns".split()
    )
    rows = world.train_rows()
    assert first["origin"] == f"{world.train}:1"
    assert first["prompt_ids"] == rows.prompt(0).tolist()
    assert first["responses_ids"] == [rows.response(0, k).tolist() for k in (0, 1)]
    assert [len(one) for one in first["learnt"]] == [len(one) for one in first["responses_ids"]]
    assert all(all(one) for one in first["learnt"])
    assert first["prompt_text"] == world.tokenizer.decode(first["prompt_ids"])
    assert first["responses_text"] == [world.tokenizer.decode(ids) for ids in first["responses_ids"]]
    assert (first["cut"], first["ignored_columns"]) == ([], ["note"])
    assert report["data.train"]["counts"]["ignored"] == {str(world.train): {"note": 2}}
    said = world.inspect("inspect.show=1")[1]
    assert f"data.train {world.train}:1, as the model sees it" in said
    assert f"): ⟦grass\\ngrass{world.tokenizer.decode(first['responses_ids'][0][-1:])}⟧\n" in said
    assert "  ignored columns: note\n" in said
    assert world.inspect("inspect.show=-1")[0] == 2


def test_rows_that_the_loss_cannot_use_are_told(world: World) -> None:
    """The rows themselves are sound, so the status stays; a training would find it after its start."""
    status, said, _ = world.inspect("loss.name=kto", "data.on_bad_row=drop")
    assert status == 0
    assert "loss.name=kto: `train` refuses these rows: data.train: the rows are of the form 'pair'" in said
    assert "loss.split_pairs=true" in said
    for fits in (["loss.name=dpo"], ["loss.name=sft"], ["loss.name=kto", "loss.split_pairs=true"]):
        assert "refuses" not in world.inspect("data.on_bad_row=drop", *fits)[1]
