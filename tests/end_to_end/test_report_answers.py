"""What the page says of the model's own answers, and that its banner praises none that were not found better."""

import html
import json
import re
from pathlib import Path

import pytest
from run_folders import add_answers, write_run_folder
from run_page import page, slow_until

from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.report.page import banner
from prefopt_dist.report.record import read_run

WORDS = ("better", "no difference to be seen", "worse", "collapsed", "not judged")


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("ill", [False, True])
def test_the_banner_says_the_verdict_first(tmp_path: Path, word: str, ill: bool) -> None:
    """And never that a run is well; a warning that stands is told beside it."""
    run = write_run_folder(tmp_path / "run", steps=60, ill=ill)
    add_answers(run, word.removesuffix(" to be seen"))
    found = banner(read_run(run, "run.dir"))
    judged = json.loads((run / "run.json").read_text())["answers"]
    assert judged["verdict"] == word
    first = "Done; whether the answers are better was not judged: " if word == "not judged" else word.capitalize()
    assert found["text"].startswith(first)
    assert str(run / "final") in found["text"]
    assert not re.search(r"\bwell\b", found["text"], re.IGNORECASE)
    assert "recovered" not in found["text"]
    moods = {"better": "good", "no difference to be seen": "open", "not judged": "open"}
    ill_moods = moods | {"better": "open", "no difference to be seen": "poor", "not judged": "poor"}
    assert found["mood"] == (ill_moods if ill else moods).get(word, "poor")
    assert ("ne warning is active: The chosen responses are losing" in found["text"]) == ill
    assert ("No rule has a warning." in found["text"]) == (not ill and word in moods)
    # What the verdict says already is said once.
    assert "The model has collapsed" not in found["text"]
    assert "earn less reward" not in found["text"]
    assert found["text"] in html.unescape(page(run))
    # A run that goes on from there: the verdict is of another model.
    (run / "DONE").unlink()
    assert banner(read_run(run, "run.dir"))["mood"] == ("poor" if ill or word in ("worse", "collapsed") else "open")


@pytest.mark.parametrize(("word", "mood"), [("better", "good"), ("not judged", "open"), ("collapsed", "poor")])
def test_what_is_over_is_no_recovery_of_bad_answers(tmp_path: Path, word: str, mood: str) -> None:
    run = write_run_folder(tmp_path / "slow", steps=60)
    slow_until(run, 30)
    add_answers(run, word)
    found = banner(read_run(run, "run.dir"))
    assert found["mood"] == mood
    assert "recovered" not in found["text"]
    assert found["text"].endswith("No warning is active any more.") == (word != "collapsed")


def test_the_models_own_answers(tmp_path: Path) -> None:
    """Start and trained beside each other, intervals where there are any, eight answers, curves of several rows."""
    run = write_run_folder(tmp_path / "run", steps=60)
    add_answers(run, "better", on_its_way=(20, 40))
    text = page(run)
    assert text.index("The model's own answers") < text.index("<h2>First and last values") < text.index("<h2>Curves")
    rows = dict(re.findall(r"<tr><td>([^<]*)</td>(<td class=\"(?:n|both)\".*?)</tr>", text))
    cells = {name: re.findall(r">([^<]+)</td>", told) for name, told in rows.items()}
    assert cells["reward"] == ["0.731 (0.690 to 0.770)", "0.812 (0.772 to 0.852)"]
    assert cells["difference of the rewards, prompt by prompt"] == ["0.081 (0.046 to 0.130)"]
    assert cells["win rate against the start"] == ["0.581 (0.546 to 0.630)"]
    assert cells["KL from the reference, nats per answer"] == ["4.200 (3.600 to 4.800)"]
    assert cells["nats per token of the answers under the reference"] == ["0.120", "0.310"]
    assert cells["nats per token of the chosen responses under the reference"] == ["0.090"]
    assert cells["nats per token of the answers under the model"] == ["–", "0.190"]
    assert cells["answers that end"] == ["98%", "97%"]
    assert text.count("before training · reward 0.25") == text.count("after training · reward 1") == 8
    assert "See you at &lt;ten&gt;." in text
    assert "64 prompts (2 more were left out)" in text
    titles = re.findall(r"<title>([^<]*)</title>", text)
    assert titles[1:4] == ["Reward of the answers", "KL from the reference", "Length of the answers"]


def test_answers_of_a_start_alone_and_without_rewards(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run", steps=60)
    add_answers(run, "not judged")
    text = page(run)
    assert "Reward of the answers" not in text
    assert "reward</td>" not in text
    assert "before training<" in text
    (run / "DONE").unlink()
    (run / "answers.jsonl").unlink()
    MetricsFile(run / "metrics.jsonl").truncate_to(20)
    text = html.unescape(page(run))
    assert "The start's answers to 64 prompts; the trained model answers them at the end." in text
    assert '<td>tokens per answer</td><td class="n">31.4</td><td class="n">–</td>' in text


def test_a_model_that_has_diverged_has_its_page(tmp_path: Path) -> None:
    """Numbers that are not finite stand in the rows, and in run.json and answers.jsonl by their word."""
    run = write_run_folder(tmp_path / "run", steps=60)
    add_answers(run, "collapsed")
    for name in ("metrics.jsonl", "run.json"):
        text = (run / name).read_text()
        (run / name).write_text(
            re.sub(r'("answers/(?:nats|kl|reward|reward_difference)"|"mean"): [-\d.]+', r'\1: "NaN"', text)
        )
    (run / "answers.jsonl").write_text(
        json.dumps({"prompt": "p", "before": "b", "after": "", "reward_after": "NaN"}) + "\n"
    )
    text = page(run)
    assert "(an empty answer)" in text
    assert "reward NaN" in text
    assert "not finite: the model has diverged" in text
