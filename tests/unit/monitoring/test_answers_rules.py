"""What is judged by the model's own answers: rules, the verdict, and how the history keeps such rows apart."""

import math
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from health_rows import FACTS, STEPS, eval_row, found, run, train_row
from places import REPOSITORY
from run_folders import answers_row

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health import RULES, RunFacts, findings
from prefopt_dist.monitoring.health.answers import find_collapse
from prefopt_dist.monitoring.health.history import History
from prefopt_dist.monitoring.verdict import not_judged, verdict

HEALTH = Health()


def nats(own: float, reference: float, start: float, chosen: float | None) -> dict[str, Any]:
    """A row of answers with these nats a token."""
    row = answers_row(step=STEPS)
    row |= {"answers/nats": own, "answers/reference_nats": reference, "answers/start/reference_nats": start}
    row["answers/kl_per_token"] = reference - own
    if chosen is None:
        del row["answers/chosen/reference_nats"]
        return row
    return row | {"answers/chosen/reference_nats": chosen}


# --- the history


def test_the_history_keeps_the_kinds_apart() -> None:
    history = History(FACTS)
    history.add(answers_row(start=True))
    assert history.answered() is None
    for row in (eval_row(0, 0.7, 0.5), *run(lambda step: {}, last=50), answers_row(step=50)):
        history.add(row)
    assert (len(history.train), len(history.evals), len(history.answers)) == (50, 1, 2)
    assert history.answered() == answers_row(step=50)
    assert (history.steps_done, history.progress) == (50, 0.5)
    history.add(train_row(51))
    assert history.progress == 0.51
    with pytest.raises(KeyError, match="other"):
        history.add(train_row(52, kind="other"))


def test_answers_are_no_evaluation() -> None:
    """The last evaluation is still the last one behind a row of answers."""
    rows = run(lambda step: {"train/rewards/accuracies": 0.99})
    rows = [*rows[:50], eval_row(50, 0.5, 0.8), *rows[50:], eval_row(STEPS, 0.6, 0.8), answers_row(step=STEPS)]
    assert findings(rows, FACTS, HEALTH)[1] == {"overfit"}


# --- the rules


# own nats, the reference's on the policy's, the start's and the chosen responses, as they were found
WRECKED = {
    "dpo": (0.57, 1.29, 0.12, 0.09),
    "adapters": (4.0, 7.45, 0.12, 0.09),
    "nothing chosen": (0.57, 1.29, 0.12, None),
}
FAR = {"a new style": (0.19, 3.48, 0.09, 3.50), "from noise": (0.14, 6.23, 6.21, 6.23), "near": (0.13, 0.2, 0.12, 0.09)}


@pytest.mark.parametrize("case", WRECKED)
def test_a_wrecked_model_has_collapsed(case: str) -> None:
    row = nats(*WRECKED[case])
    (finding,) = found([*run(lambda step: {}), answers_row(start=True), row])
    assert (finding.id, finding.step, finding.level) == ("answers-collapsed", STEPS, "warning")
    assert f"costs the reference {row['answers/reference_nats']:.2f} nats" in finding.evidence
    assert "plus 0.35)" in finding.evidence
    assert "threshold 1.25 times 0.12" in finding.evidence
    assert verdict(row, HEALTH, "final").word == "collapsed"


@pytest.mark.parametrize("case", FAR)
def test_far_is_not_collapsed(case: str) -> None:
    row = nats(*FAR[case])
    assert found([*run(lambda step: {}), answers_row(start=True), row]) == []
    assert verdict(row, HEALTH, "final").word == "better"


@pytest.mark.parametrize(("name", "value"), list(product(("nats", "reference_nats"), (math.nan, math.inf))))
def test_a_model_that_has_diverged_has_collapsed(name: str, value: float) -> None:
    row = answers_row(step=STEPS) | {f"answers/{name}": value}
    assert "not finite" in (find_collapse(row, HEALTH) or "")
    assert verdict(row, HEALTH, "final").word == "collapsed"


def test_collapse_needs_all_of_it_and_never_looks_at_kl() -> None:
    sure, unsure = 0.14, 0.57
    assert find_collapse(nats(sure, 1.29, 0.12, 0.09), HEALTH) is None
    assert find_collapse(nats(unsure, 0.45, 0.12, 0.09), HEALTH) is None
    assert find_collapse(nats(0.4, 0.68, 0.12, 0.09), HEALTH) is None  # noisier, but not moved
    assert find_collapse(nats(sure, 0.2, 0.12, 0.09) | {"answers/kl": 1e6, "answers/kl_per_token": 1e4}, HEALTH) is None
    assert find_collapse(answers_row(start=True), HEALTH) is None
    assert find_collapse(nats(unsure, 1.29, 0.12, 0.09), Health(collapse_excess=1.2)) is None
    assert find_collapse(nats(unsure, 1.29, 0.12, 0.09), Health(collapse_own=5.0)) is None
    assert find_collapse(nats(unsure, 1.29, 0.12, 0.09), Health(collapse_moved=0.8)) is None


@pytest.mark.parametrize(("name", "value", "said"), [("repeated_4grams", 0.6, "4-grams"), ("ended", 0.1, "end, of")])
def test_a_model_that_loops_has_collapsed_however_sure_it_is(name: str, value: float, said: str) -> None:
    row = nats(0.05, 1.29, 0.12, 0.09)
    assert find_collapse(row, HEALTH) is None
    assert said in (find_collapse(row | {f"answers/{name}": value}, HEALTH) or "")
    far = nats(0.05, 3.48, 0.09, 3.50) | {f"answers/{name}": value}  # the chosen ones do so too
    assert find_collapse(far, HEALTH) is None


def rules_of(**changes: Any) -> Iterator[tuple[str, str, str]]:
    """Id, level and evidence of what is found where the row of answers has these values."""
    row = answers_row(step=STEPS) | {f"answers/{name}": value for name, value in changes.items()}
    for finding in found([answers_row(start=True), *run(lambda step: {}), row]):
        assert finding.remedy
        yield finding.id, finding.level, finding.evidence


def test_worse_longer_and_unended_answers() -> None:
    assert list(rules_of()) == []
    ((rule, level, evidence),) = rules_of(
        reward=0.5, reward_difference=-0.2, reward_difference_low=-0.3, reward_difference_high=-0.1
    )
    assert (rule, level) == ("answers-worse", "warning")
    assert "They earn 0.5 where the start's earned 0.731" in evidence
    assert list(rules_of(reward_difference=-0.2, reward_difference_high=0.0)) == []
    ((rule, level, evidence),) = rules_of(length=62.8)
    assert (rule, level) == ("answers-longer", "info")
    assert "62.8 tokens on average, one of the start's had 31.4 (threshold 1.5 times)" in evidence
    assert list(rules_of(length=47.0)) == []
    ((rule, level, evidence),) = rules_of(ended=0.7)
    assert (rule, level) == ("answers-do-not-end", "warning")
    assert "70% of the answers end by themselves, of the start's 98% did (threshold 20% fewer)" in evidence
    assert list(rules_of(ended=0.79)) == []


def test_without_rewards_nothing_is_worse() -> None:
    assert found([*run(lambda step: {}), answers_row(rewards=False, step=STEPS)]) == []


def test_one_good_measurement_is_a_recovery() -> None:
    """And the model that collapses again is told again."""
    bad, good = answers_row("collapsed", step=30), answers_row(step=60)
    rows = [*run(lambda step: {}, last=30), bad, *run(lambda step: {}, last=60)[30:], good]
    assert findings(rows[:-1], FACTS, HEALTH)[1] == {"answers-collapsed"}
    assert findings(rows, FACTS, HEALTH)[1] == set()
    again = [*rows, train_row(61), answers_row("collapsed", step=62)]
    assert [f.step for f in findings(again, FACTS, HEALTH)[0]] == [30, 62]


def displaced(times: float, reference: float = -40.0) -> list[Any]:
    """What a run finds whose chosen responses have lost so many times what the reference gave them, at half of it."""

    def of(step: int) -> dict[str, Any]:
        logratio = times * reference * min(1.0, step / 50)
        return {"train/logratio/chosen": logratio, "train/logps/chosen": reference + logratio}

    return found(run(of))


def test_displacement_by_what_the_reference_gave() -> None:
    for times in (2.0, 7.9):
        (finding,) = displaced(times)
        assert (finding.id, finding.level) == ("likelihood-displaced", "warning")
        assert finding.step < STEPS / 2 + 10
        assert "threshold 1" in finding.evidence
    assert displaced(0.35) == displaced(-0.5) == displaced(1.0) == []
    # Of a sure reference little is gone per token, and all of it.
    assert [f.id for f in displaced(2.0, reference=-1.5)] == ["likelihood-displaced"]


def test_displacement_without_a_reference() -> None:
    def rows(lost: float) -> list[Any]:
        kept = run(lambda step: {"train/logps/chosen": -40.0 - (lost if step > 20 else 0.0)})
        return [{k: v for k, v in row.items() if "logratio" not in k and "reference" not in k} for row in kept]

    (finding,) = found(rows(100.0), RunFacts(STEPS))
    assert finding.id == "likelihood-displaced"
    assert "the model of the first rows gives it -40" in finding.evidence
    assert found(rows(39.0), RunFacts(STEPS)) == found(rows(-30.0), RunFacts(STEPS)) == []


# --- the verdict


@pytest.mark.parametrize("word", ["better", "no difference to be seen", "worse", "collapsed", "not judged"])
def test_each_word_of_the_verdict(word: str) -> None:
    row = answers_row(word.removesuffix(" to be seen"), rewards=word != "not judged")
    found = verdict(row, HEALTH, "runs/x/final")
    assert found.word == word
    assert found.text.startswith(f"{word}: ")
    assert "runs/x/final" in found.text
    assert "\n" not in found.text
    assert not found.text.endswith(".")


def test_the_verdicts_numbers() -> None:
    assert verdict(answers_row(), HEALTH, "runs/x/final").text == (
        "better: answers of runs/x/final earn 0.812 where the start's earned 0.731 (difference 0.081, 0.046 to 0.130, "
        "64 prompts)"
    )
    other = verdict(answers_row("worse"), HEALTH, "final", "models/other").text
    assert "where models/other's earned" in other


@pytest.mark.parametrize("compared", [0, 1, 7])
def test_few_prompts_are_not_judged(compared: int) -> None:
    """Two equal differences would have an interval without width."""
    found = verdict(answers_row() | {"answers/compared": compared}, HEALTH, "final")
    assert found.word == "not judged"
    assert f"{compared} of 64 prompts have a reward" in found.text
    assert verdict(answers_row() | {"answers/compared": 8}, HEALTH, "final").word == "better"


def test_a_reward_excuses_no_collapse() -> None:
    row = answers_row() | nats(*WRECKED["dpo"])
    assert row["answers/reward_difference_low"] > 0
    assert verdict(row, HEALTH, "final").word == "collapsed"
    assert verdict(answers_row("collapsed", rewards=False), HEALTH, "final").word == "collapsed"


def test_not_judged_says_what_to_do() -> None:
    found = verdict(answers_row(rewards=False), HEALTH, "final")
    assert "has not collapsed" in found.text
    for key in ("generate.rewards", "`evaluate`", "evaluate.prompts"):
        assert key in found.text
    assert not_judged("answers.number=0") == ("not judged", "not judged: answers.number=0")


# --- the documentation


def test_the_documentation_has_every_name_of_a_row() -> None:
    text = (REPOSITORY / "docs" / "metrics.md").read_text()
    section = text.split("## Of the model's own answers")[1].split("\n## ")[0]
    told = set()
    for line in re.findall(r"^\| (`answers/.*?) \|", section, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", line)
        told |= {first, *(first + name[1:] if name.startswith("…") else name for name in others)}
    assert told == {name for name in answers_row() if "/" in name}
    health = (REPOSITORY / "docs" / "health.md").read_text()
    assert len(RULES) == 18
    assert "Eighteen rules watch the rows" in health
