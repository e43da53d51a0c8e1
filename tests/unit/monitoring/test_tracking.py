"""The truth of metrics.jsonl, and that W&B gets all of it, once, and can do no harm."""

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb_reader

from prefopt_dist.errors import UserError
from prefopt_dist.monitoring import console
from prefopt_dist.monitoring.console import Progress, print_rank_fault, say
from prefopt_dist.monitoring.loggers import Loggers, Sample, TensorBoardLogger
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.statistics import BIN_EDGES, Statistics, means


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("WANDB_") or name == "RANK"]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs the tests


def _messages(text: str) -> list[str]:
    """Return the messages without what begins each line in a file: time, level and rank."""
    prefix = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO rank 0: ")
    lines = text.splitlines()
    assert all(prefix.match(line) for line in lines), text
    return [prefix.sub("", line, count=1) for line in lines]


def _row(file: MetricsFile, step: int, kind: str = "train", **metrics: float) -> None:
    file.append(kind, step, step / 10, step * 4, {f"{kind}/loss": 1 / (step + 1), **metrics})


# --- metrics.jsonl


def test_rows_come_back_as_written_and_lines_are_strict_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.rows() == []
    assert not (tmp_path / "metrics.jsonl").exists()
    _row(file, 1, bad=math.nan, big=math.inf, small=-math.inf, third=1 / 3)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert list(line) == ["kind", "step", "epoch", "pairs_seen", "train/loss", "bad", "big", "small", "third"]
    assert (line["bad"], line["big"], line["small"]) == ("NaN", "Infinity", "-Infinity")
    (row,) = MetricsFile(tmp_path / "metrics.jsonl").rows()
    assert math.isnan(row["bad"])
    assert row["big"] == math.inf
    assert row["small"] == -math.inf
    assert row["third"] == 1 / 3
    assert (row["kind"], row["step"], row["pairs_seen"]) == ("train", 1, 4)


def test_a_pair_of_kind_and_step_is_unique_over_starts(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    _row(file, 1)
    file.close()
    again = MetricsFile(tmp_path / "metrics.jsonl")
    assert again.has("train", 1)
    assert not again.has("eval", 1)
    _row(again, 1, "eval")
    with pytest.raises(AssertionError, match="already"):
        _row(again, 1)
    with pytest.raises(AssertionError, match="a metric must not have"):
        again.append("train", 2, 0.0, 0, {"step": 3.0})
    assert len(again.rows()) == 2


def test_truncate_to_keeps_the_checkpoints_step_and_drops_later_and_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    _row(file, 0, "eval")
    for step in (1, 2, 3):
        _row(file, step, third=step / 3)
        _row(file, step, "eval", odd=math.nan)
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "train", "step": 4, "ep')
    resumed = MetricsFile(path)
    assert not resumed.has("train", 4)
    assert resumed.truncate_to(2) == 2
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:5])
    assert resumed.has("eval", 2)
    assert not resumed.has("train", 3)
    _row(resumed, 3)
    assert [(row["kind"], row["step"]) for row in resumed.rows()][-2:] == [("eval", 2), ("train", 3)]
    inode = path.stat().st_ino
    assert resumed.truncate_to(3) == 0
    assert path.stat().st_ino == inode
    _row(resumed, 4)
    assert resumed.truncate_to(1) == 4  # also with the descriptor open on the replaced file
    _row(resumed, 2)
    assert [row["step"] for row in resumed.rows()] == [0, 1, 1, 2]


def test_an_append_after_a_torn_line_or_a_full_disk_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    _row(MetricsFile(path), 1)
    with open(path, "ab") as raw:
        raw.write(b'{"kind')
    file = MetricsFile(path)
    _row(file, 2)
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:9]))
        with pytest.raises(OSError, match="the disk is full"):
            _row(file, 3)
    _row(file, 3)
    file.sync()
    assert [row["step"] for row in MetricsFile(path).rows()] == [1, 2, 3]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}x\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 "):
        MetricsFile(path)


def test_a_cursor_reads_each_row_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    rows, offset = file.rows_after(0)
    assert (rows, offset) == ([], 0)
    _row(file, 1)
    rows, offset = file.rows_after(offset)
    assert [row["step"] for row in rows] == [1]
    _row(file, 2)
    assert [row["step"] for row in file.rows_after(offset)[0]] == [2]


# --- Weights & Biases


def test_environment_overrides_mode_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    logger = wandb_reader.logger(tmp_path, MetricsFile(tmp_path / "m"), mode="online")
    logger.sync()
    logger.finish()
    assert _messages(capsys.readouterr().out) == ["W&B: WANDB_MODE=disabled overrides tracking.wandb.mode=online"]
    monkeypatch.setenv("WANDB_MODE", "of")
    wandb_reader.logger(tmp_path, MetricsFile(tmp_path / "m"), mode="online").finish()
    assert "disabled, as WANDB_MODE=of" in capsys.readouterr().out


class _FakeSettings:
    init_timeout = finish_timeout = 1.0
    sync_dir = "somewhere"

    def __init__(self, **given: object) -> None:
        self.given = given


class _FakeRun:
    """A W&B run whose server has rows already; fails at the named call."""

    settings = _FakeSettings()
    url = "https://wandb.example/run"

    def __init__(self, step: int, broken: str) -> None:
        self.step = step
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.alerts: list[str] = []
        self._broken = broken

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
        if self._broken == "log":
            raise RuntimeError("no server\nmore")
        self.sent.append((step, values))

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append(f"{level}: {title}: {text}")

    def finish(self, exit_code: int) -> None:
        if self._broken == "finish":
            raise TimeoutError("Timed out finishing run.")


def _fake(monkeypatch: pytest.MonkeyPatch, run: _FakeRun, broken: str) -> dict[str, Any]:
    import wandb

    asked: dict[str, Any] = {}

    def init(**given: Any) -> _FakeRun:
        asked.update(given)
        if broken == "init":
            raise SystemExit("no")
        return run

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: broken != "login")
    monkeypatch.setattr(wandb, "Settings", _FakeSettings)
    monkeypatch.setattr(wandb, "setup", lambda settings: None)
    return asked


def test_online_resumes_behind_what_the_server_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _FakeRun(2, "")
    asked = _fake(monkeypatch, run, "")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "7")
    (tmp_path / "wandb" / "offline-run-1-abc123").mkdir(parents=True)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        _row(metrics, step)
    logger = wandb_reader.logger(tmp_path, metrics, "online")
    _row(metrics, 4)
    logger.sync()
    logger.finish()
    assert [(index, row["step"], row["pairs_seen"]) for index, row in run.sent] == [(2, 3, 12), (3, 4, 16)]
    assert (asked["id"], asked["resume"], asked["dir"]) == ("abc123", "allow", str(tmp_path))
    assert "project" not in asked
    assert asked["name"] == "n"
    assert "init_timeout" not in asked["settings"].given
    assert asked["settings"].given["console"] == "off"
    assert os.listdir(tmp_path / "wandb") == ["superseded"]


def test_alerts_histograms_and_the_summary_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _FakeRun(0, "")
    _fake(monkeypatch, run, "")
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    counts = [0] * (len(BIN_EDGES) + 1)
    counts[30] = 7
    metrics.append("train", 1, 0.1, 8, {"train/loss": 0.1, "train/rewards/margins_histogram": counts})
    for step, loss, accuracy in ((0, 0.7, 0.4), (10, 0.5, 0.6), (20, 0.6, 0.8)):
        metrics.append("eval", step, 0.1, 8, {"eval/loss": loss, "eval/x/rewards/accuracies": accuracy})
    logger = wandb_reader.logger(tmp_path, metrics, "online")
    logger.alert("a title", "a text")
    # A reward is no evaluation's; and `loss` at the end of a name makes none.
    metrics.append("answers", 20, 0.1, 8, {"answers/reward": 0.5, "answers/rewards/margins": 9.0})
    logger.samples([Sample("a prompt", "before", "after")])
    logger.verdict("better", "better: by much")
    logger.finish()
    index, last = run.sent[-1]
    assert index == 5  # behind the rows
    assert run.sent[4][1] == {
        **{"step": 20, "epoch": 0.1, "pairs_seen": 8},
        **{"answers/reward": 0.5, "answers/rewards/margins": 9.0},
    }
    assert (last["samples"].columns, last["samples"].data) == (
        ["prompt", "before", "after"],
        [["a prompt", "before", "after"]],
    )
    assert run.alerts == ["WARN: a title: a text"]
    assert run.summary == {
        **{"best/eval/loss": 0.5, "best/eval/x/rewards/accuracies": 0.8, "health/warnings": 1},
        **{"verdict": "better", "verdict_text": "better: by much"},
    }
    shown = run.sent[0][1]["train/rewards/margins_histogram"]
    assert shown.histogram == counts
    assert list(shown.bins[1:-1]) == list(BIN_EDGES)


def test_samples_with_rewards_have_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _FakeRun(0, "")
    _fake(monkeypatch, run, "")
    logger = wandb_reader.logger(tmp_path, MetricsFile(tmp_path / "metrics.jsonl"), "online")
    logger.samples([Sample("a", "b", "c", 0.5, 1.0), Sample("d", "e", "f")])
    logger.finish()
    table = run.sent[-1][1]["samples"]
    assert table.columns == ["prompt", "before", "after", "reward_before", "reward_after"]
    assert table.data == [["a", "b", "c", 0.5, 1.0], ["d", "e", "f", None, None]]
    assert "verdict" not in run.summary


def test_several_outlets_hear_everything() -> None:
    heard: list[tuple[str, Any]] = []

    class Outlet:
        def __getattr__(self, name: str) -> Any:
            return lambda *given, **more: heard.append((name, given))

    loggers = Loggers(Outlet(), Outlet())
    loggers.sync()
    loggers.samples([])
    loggers.verdict("worse", "worse: by much")
    loggers.finish()
    told: list[tuple[str, Any]] = [
        ("sync", ()),
        ("samples", ([],)),
        ("verdict", ("worse", "worse: by much")),
        ("finish", ()),
    ]
    assert heard == [event for event in told for _ in range(2)]


def test_a_warning_of_an_earlier_start_reaches_who_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server has it, an offline folder that takes over does not; both count it in the summary."""
    for mode, sent in (("online", ["WARN: new: b"]), ("offline", ["WARN: old: a", "WARN: new: b"])):
        run = _FakeRun(0, "")
        _fake(monkeypatch, run, "")
        metrics = MetricsFile(tmp_path / "metrics.jsonl")
        logger = wandb_reader.logger(tmp_path, metrics, mode)
        logger.alert("old", "a", again=True)
        logger.alert("new", "b")
        logger.finish()
        assert run.alerts == sent
        assert run.summary["health/warnings"] == 2


def test_the_best_evaluation_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _FakeRun(0, "")
    _fake(monkeypatch, run, "")
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step, loss in enumerate((math.nan, 0.5, 0.4, math.nan)):
        metrics.append("eval", step, 0.1, 8, {"eval/loss": loss})
    wandb_reader.logger(tmp_path, metrics, "online").finish()
    assert run.summary["best/eval/loss"] == 0.4


def test_tensorboard_has_the_rows_of_the_file_after_a_rollback(tmp_path: Path) -> None:
    """Each start writes the whole run anew: no row twice, none of those that were cut back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    first = TensorBoardLogger(tmp_path, metrics)
    counts = [0] * (len(BIN_EDGES) + 1)
    counts[40] = 3
    for step in (1, 2, 3):
        metrics.append(
            "train", step, step / 10, 4 * step, {"train/loss": 1 / step, "train/rewards/margins_histogram": counts}
        )
        first.sync()
    metrics.truncate_to(1)  # and the first one is never finished
    second = TensorBoardLogger(tmp_path, metrics)
    second.sync()
    _row(metrics, 2, third=math.nan)
    metrics.append("answers", 2, 0.2, 8, {"answers/kl": 3.5})
    second.alert("a title", "a text")
    second.samples([Sample("a prompt", "b", "c", 0.25, 1.0)])
    second.verdict("better", "better: by much")
    second.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, pytest.approx(1 / 3))]
    assert [e.value for e in events.Scalars("pairs_seen")] == [4.0, 8.0, 8.0]  # of each row
    assert math.isnan(events.Scalars("third")[0].value)
    assert [(e.step, e.value) for e in events.Scalars("answers/kl")] == [(2, 3.5)]
    texts = {
        name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("samples", "verdict")
    }
    assert texts["verdict"] == "better: by much"
    assert "before (reward 0.25): b" in texts["samples"]
    assert "after (reward 1): c" in texts["samples"]
    (histogram,) = events.Histograms("train/rewards/margins_histogram")
    assert histogram.histogram_value.num == 3


@pytest.mark.parametrize("broken", ["import", "login", "init", "log", "finish"])
def test_a_failing_wandb_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    _fake(monkeypatch, _FakeRun(0, broken), broken)
    if broken == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    logger = wandb_reader.logger(tmp_path, metrics, "online")
    for step in (1, 2, 3):
        _row(metrics, step)
        logger.sync()
    logger.finish()
    out = capsys.readouterr().out
    assert out.count("W&B: off") == 1
    assert "more" not in out
    assert len(metrics.rows()) == 3


def test_a_failing_wandb_tells_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _FakeRun(0, "")
    _fake(monkeypatch, run, "")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdefghij")

    def refuse(values: dict[str, Any], step: int, commit: bool) -> None:
        raise RuntimeError("401 for https://user:secret@proxy.example and 0123456789abcdefghij")

    monkeypatch.setattr(run, "log", refuse)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    _row(metrics, 1)
    wandb_reader.logger(tmp_path, metrics, "online").finish()
    out = capsys.readouterr().out
    assert "401 for https://***@proxy.example and ***" in out
    assert "0123456789" not in out


def test_a_hanging_wandb_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefopt_dist.monitoring import wandb_logger

    _fake(monkeypatch, _FakeRun(0, ""), "")
    import wandb

    monkeypatch.setattr(wandb, "login", lambda prompt, verify: time.sleep(600))
    for name in ("_INIT_SECONDS", "_FINISH_SECONDS", "_GRACE_SECONDS"):
        monkeypatch.setattr(wandb_logger, name, 0.05)
    started = time.monotonic()
    logger = wandb_reader.logger(tmp_path, MetricsFile(tmp_path / "metrics.jsonl"), "online")
    logger.sync()
    logger.finish()
    assert time.monotonic() - started < 5
    assert "does not answer" in capsys.readouterr().out


# --- statistics, progress, messages


def test_means_are_exact_over_unequal_ranks() -> None:
    ranks = [Statistics(("loss", "margin"), torch.device("cpu")) for _ in range(2)]

    def add(rank: int, loss: float, margin: float, units: int) -> None:
        ranks[rank].add(torch.tensor([loss, margin], dtype=torch.float64), units)

    add(0, 3.0, 30.0, 3)
    add(0, 4.0, 10.0, 1)
    add(1, 1.0, 2.0, 1)
    reduced = (ranks[0].packed() + ranks[1].packed()).tolist()
    assert means(("loss", "margin"), reduced, {}) == {"loss": 8 / 5, "margin": 42 / 5}
    packed = ranks[0].packed()
    packed.zero_()
    assert ranks[0].packed().tolist() == [7.0, 40.0, 4.0]  # a copy was given


def test_progress_lines_count_this_start_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("prefopt_dist.monitoring.console.time.monotonic", lambda: now[0])
    with Progress(800, "train", "steps", rank=0, done=100) as bar:
        for _ in range(20):
            now[0] += 3.0
            bar.update(1, "loss 0.6123")
    lines = _messages(capsys.readouterr().err)
    assert lines[0] == "train  101/800 steps (12%)  0:03 elapsed, 34:57 left  loss 0.6123"
    assert lines[1] == "train  105/800 steps (13%)  0:15 elapsed, 34:45 left  loss 0.6123"
    assert lines[-1] == "train  120/800 steps (15%)  1:00 elapsed, 34:00 left  loss 0.6123"
    assert len(lines) == 6
    with Progress(1, "score", "rows", rank=1) as other:
        other.update()
    with Progress(2, "score", "rows", rank=0) as short:
        short.update()
        short.update()
    lines = _messages(capsys.readouterr().err)
    assert lines == ["score  1/2 rows (50%)  0:00 elapsed, 0:00 left", "score  2/2 rows (100%)  0:00 elapsed"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(4, "train", "steps", rank=0, done=2) as bar:
        bar.update(2, "loss 0.5")
    assert "4/4" in capsys.readouterr().err


def test_rank_0_speaks_and_any_rank_tells_its_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say("one")
    monkeypatch.setenv("RANK", "3")
    say("two")
    print_rank_fault("a\nb")
    out, err = capsys.readouterr()
    assert _messages(out) == ["one"]
    assert err == "[rank 3] a\n[rank 3] b\n"


def test_rows_are_told_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    tell = console.row_reporter("data.train: tokenising")
    for at, rows in ((109.0, 1000), (111.0, 2000), (112.0, 3000), (180.0, 123_456)):
        now[0] = at
        tell(rows, None)
    assert _messages(capsys.readouterr().err) == [
        "data.train: tokenising  2,000 rows  0:11 elapsed",
        "data.train: tokenising  123,456 rows  1:20 elapsed",
    ]
