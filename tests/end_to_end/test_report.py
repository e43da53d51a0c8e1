"""The page about a run: what it says, and that it needs nothing else."""

import json
import os
import re
from pathlib import Path

import pytest
import worlds
from data_for_tests import lines, prepare
from run_folders import add_answers, write_run_folder
from run_page import page, slow_until
from tokenizers_for_tests import CHATML, small_tokenizer

from prefopt_dist.cli import main
from prefopt_dist.data import open_rows
from prefopt_dist.data.example import Message
from prefopt_dist.data.quality.show import rows_for_report, show_rows
from prefopt_dist.files import write_json
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.report.page import banner
from prefopt_dist.report.record import read_run
from prefopt_dist.report.sweep import sweep_table

LOUD = "&lt;script&gt;alert(1)&lt;/script&gt;&lt;|im_end|&gt;"


def says(text: str) -> Message:
    return Message("assistant", text)


def test_the_page_of_a_run(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "ill", ill=True, sets=("helpful", "harmless"))
    (run / "inspection.json").write_text(json.dumps({"data.train": {"findings": {"<b>equal</b>": 7}}}))
    (run / "answers.jsonl").write_text(json.dumps({"prompt": "Say <hi>", "before": "no", "after": "hi & ho"}) + "\n")
    text = page(run)
    plain = text.replace("\u200b", "")
    assert "Not healthy: one warning is active. The chosen responses are losing their probability." in text
    for said in (
        "chosen-falls",
        "Raise loss.beta",
        "train.dropped.empty response",
        "&lt;b&gt;equal&lt;/b&gt;",
        "2026-01-01T12:00:00",
        "checkpoint of step",
        "2.13.0",
        "micro_batch_tokens",
        "evaluation harmless",
        "Say &lt;hi&gt;",
        "hi &amp; ho",
    ):
        assert said in plain, said
    titles = re.findall(r"<title>([^<]*)</title>", text)
    assert titles == [
        "ill",
        "Loss",
        "Accuracy of the rewards",
        "Margin of the rewards",
        "Rewards",
        "Margins of the pairs",
        "Log-probs per token",
        "Log-ratios to the reference per token",
        "Gradient norm before clipping",
        "Throughput",
        "Time by part of the step",
        "Memory of a rank",
        "Events",
    ]
    assert not re.search(r"#0[123]0[123]0\d", text), "a stand-in of a colour is left"
    assert "mathdefault" not in text, "a label is a formula, as it is written"


def test_the_page_shows_rows_as_the_model_sees_them(tmp_path: Path) -> None:
    """Learnt text is marked, and what a row says is no markup."""
    run = write_run_folder(tmp_path / "well", steps=20)
    assert "as the model sees them" not in page(run)
    asked, told = Message("user", "what is <b>blue</b>?"), Message("tool", "<i>sky</i>")
    answers = [(says("look"), told, says("the <sky>")), (says("<script>alert(1)</script>"),)]
    tokenizer = small_tokenizer(CHATML)
    row = {"prompt": [asked.as_dict()], "chosen": [turn.as_dict() for turn in answers[0]], "extra": 1}
    row |= {"rejected": [turn.as_dict() for turn in answers[1]]}
    path = lines(tmp_path / "rows.jsonl", [row])
    rows = open_rows(prepare(tmp_path, path, tokenizer=tokenizer))
    shown = rows_for_report(show_rows("data.train", rows, tokenizer, 2), rows.kind, tokenizer)
    write_json(run / "shown.json", shown)
    text = page(run)
    assert f"{path}:1 · prompt, {len(rows.prompt(0))} tokens · ignored columns: extra" in text
    assert "&lt;|im_start|&gt;user\nwhat is &lt;b&gt;blue&lt;/b&gt;?&lt;|im_end|&gt;" in text
    learnt = re.findall(r"<mark>(.*?)</mark>", text, re.DOTALL)
    assert learnt == ["Marked", "look&lt;|im_end|&gt;", "the &lt;sky&gt;&lt;|im_end|&gt;", LOUD]
    assert "tool\n&lt;i&gt;sky&lt;/i&gt;&lt;|im_end|&gt;" in text
    assert f"rejected, {len(rows.response(0, 1))} tokens, {len(rows.response(0, 1))} learnt" in text


def test_a_run_without_findings_and_one_that_has_not_begun(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "well", steps=60)
    assert "No rule has a warning. Whether the answers are better was not judged." in page(run)
    (run / "DONE").unlink()
    MetricsFile(run / "metrics.jsonl").truncate_to(20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # while the run writes
    text = page(run)
    assert "No rule has a warning. Whether the answers are better is judged at the end of the run." in text
    assert "step 20 of 60" in text
    (run / "metrics.jsonl").unlink()
    assert "Nothing to judge yet" in page(run)


def test_a_warning_that_is_over_is_no_verdict(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "slow", steps=60)
    slow_until(run, 30)
    record = read_run(run, "run.dir")
    assert [f.id for f in record.findings if f.level == "warning"] == ["slow-rank"]
    assert banner(record)["text"].startswith("The run has recovered")


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [
        write_run_folder(tmp_path / f"beta{beta}", steps=60, ill=beta == 0.1, beta=beta, seed=i)
        for i, beta in enumerate((0.1, 0.3, 0.5))
    ]
    text = page(runs[0], f"report.compare=[{', '.join(map(str, runs))}]")
    assert "The runs differ in: loss.beta." in text
    assert "chosen-falls" in text
    assert len(re.findall(r"<title>", text)) == 9
    assert "verdict on the answers" not in text
    for run, word in zip(runs, ("better", "collapsed"), strict=False):
        add_answers(run, word)
    text = page(runs[0], f"report.compare=[{', '.join(map(str, runs))}]")
    assert '<td>better</td><td class="n">0.812</td><td class="n">4.2</td>' in text
    assert '<td>collapsed</td><td class="n">0.741</td><td class="n">25.2</td>' in text
    assert '<td>–</td><td class="n">–</td><td class="n">–</td>' in text
    assert all(f"<strong>beta{beta}</strong>" in text for beta in (0.1, 0.3, 0.5))


def test_names_are_no_markup(tmp_path: Path) -> None:
    """Of runs and of sets: HTML, formulas, and what matplotlib leaves out of a legend."""
    sets = ("<script>alert(1)</script>", "$\\frac{$", "_hidden")
    runs = [write_run_folder(tmp_path / name, steps=20, sets=sets) for name in ("_a<b>&$x^$", "$\\sum$")]
    config = (runs[0] / "config.yaml").read_text()
    (runs[0] / "config.yaml").write_text(config + "# </pre><script>alert(2)</script>\n")
    for text in (page(runs[0]), page(runs[0], f"report.compare={json.dumps(list(map(str, runs)))}")):
        plain = text.replace("\u200b", "")
        assert "_a&lt;b&gt;&amp;$x^$" in plain
    text = page(runs[0]).replace("\u200b", "")
    assert "evaluation &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "evaluation $\\frac{$" in text
    assert "evaluation _hidden" in text


def test_a_run_that_goes_on_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its older checkpoint is pruned between the look at the folder and that at its files."""
    run = write_run_folder(tmp_path / "going-on", steps=20)
    (run / "DONE").unlink()
    gone = run / "checkpoints" / "step-00000010" / "manifest.json"
    stat = Path.stat

    def vanishing(self: Path, **options: bool) -> os.stat_result:
        if self == gone:
            raise FileNotFoundError(self)
        return stat(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", vanishing)
        assert [c.step for c in read_run(run, "run.dir").checkpoints] == [20]
    (row,) = sweep_table([read_run(run, "run.dir")])
    assert row["state"] == "not finished"


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worlds.write_run(tmp_path / "run.yaml", tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "none")
    assert main(["report", str(tmp_path / "run.yaml")]) == 2
    assert "run.dir: " in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run.yaml"), f"report.compare=[{tmp_path}]"]) == 2
    assert "report.compare[0]: " in capsys.readouterr().err
