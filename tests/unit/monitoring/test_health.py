"""The health rules on rows made for them: each speaks where it should, once, and again only when it has recovered."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from health_cases import DUE
from health_rows import FACTS, STEPS, G, eval_row, found, histogram, run, train_row
from places import REPOSITORY

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health import RULES, HealthFinding, RunFacts, Watch, findings
from prefopt_dist.monitoring.health.history import History
from prefopt_dist.monitoring.health.machine import gradient_spike, memory_creep
from prefopt_dist.monitoring.metrics_file import MetricsFile, Row

WINDOW = 10


def test_a_run_that_is_well_has_no_finding() -> None:
    rows = [eval_row(0, 0.693, 0.0), *run(lambda step: {})]
    rows.insert(51, eval_row(50, 0.6, 0.7))
    rows.append(eval_row(100, 0.5, 0.72, "named"))
    assert found(rows) == []


MARGINS_WITH_A_FIFTH_WRONG = histogram([5.0] * 50 + [-5.0] * 14)

ILL: dict[str, Callable[[int], dict[str, Any]]] = {
    "labels-flipped": lambda step: {"train/reference/accuracies": 0.1, "train/reference/accuracies_per_token": 0.2},
    "accuracy-stuck": lambda step: {"train/rewards/accuracies": 0.51 + 0.02 * (step % 3)},
    "noisy-labels": lambda step: {"train/rewards/margins_histogram": MARGINS_WITH_A_FIFTH_WRONG},
    "no-learning": lambda step: {
        "train/rewards/accuracies": 0.5,
        "train/logratio/chosen_per_token": 1e-4,
        "train/logratio/rejected_per_token": -1e-4,
        "train/rewards/margins_p10": -0.01,
        "train/rewards/margins_p90": 0.01,
    },
    "diverging": lambda step: {"train/loss": 0.693 + 0.01 * step},
    "chosen-falls": lambda step: {"train/logratio/chosen_per_token": -0.01 * step},
    "likelihood-displaced": lambda step: {"train/logratio/chosen": -1.0 * step, "train/logps/chosen": -40.0 - step},
    "rewards-fall": lambda step: {
        "train/rewards/chosen": -0.01 * step,
        "train/rewards/rejected": -0.02 * step,
        "train/logratio/chosen_per_token": -0.001 * step,
    },
    "length-bias": lambda step: {"train/rewards/margins_by_length": 0.75, "train/lengths/chosen_longer": 0.7},
    "saturated": lambda step: {"train/saturated": 0.99},
    "gradient-spike": lambda step: {"train/grad_norm": 30.0 if step == 50 else 1.0},
    "slow-rank": lambda step: {"perf/slowest_rank": 2, "perf/slowest_rank_seconds": 2.0},
    "memory-creep": lambda step: {"perf/memory_gib": 10 * 1.01**step},
}


ANSWERS = {"answers-collapsed", "answers-worse", "answers-longer", "answers-do-not-end"}
"""tests/unit/monitoring/test_answers_rules.py has their runs."""


@pytest.mark.parametrize("rule", ILL)
def test_each_rule_speaks_once_where_it_should(rule: str) -> None:
    (finding,) = found(run(ILL[rule]))
    assert finding.id == rule
    assert any(letter.isdigit() for letter in finding.evidence)
    assert "threshold" in finding.evidence or finding.level == "info"
    assert finding.remedy
    assert rule in finding.text()


def test_every_rule_has_its_run() -> None:
    assert {rule.id for rule in RULES} == ILL.keys() | {"overfit"} | ANSWERS
    assert len({rule.id for rule in RULES}) == len(RULES)


def test_the_documentation_has_every_rule_and_every_run_that_is_ill_on_purpose() -> None:
    text = (REPOSITORY / "docs" / "health.md").read_text()
    table = re.findall(r"^\| `([a-z-]+)`", text, re.MULTILINE)
    assert table == [rule.id for rule in RULES]
    due = re.findall(r"^\| [^|]+ \| [^|]+ \| `([a-z-]+)`", text.split("## Ill on purpose")[1], re.MULTILINE)
    assert due == list(DUE.values())
    assert "\n| healthy: " in text


def test_overfit_needs_training_near_1_and_an_evaluation_that_gets_worse() -> None:
    def rows(accuracy: float, last: Row) -> list[Row]:
        trained = run(lambda step: {"train/rewards/accuracies": accuracy})
        return [*trained[:50], eval_row(50, 0.5, 0.8), *trained[50:], last]

    (finding,) = found(rows(0.99, eval_row(100, 0.6, 0.8)))
    assert finding.id == "overfit"
    assert "eval/loss is 0.6 and was 0.5" in finding.evidence
    (finding,) = found(rows(0.99, eval_row(100, 0.5, 0.55)))
    assert "was 0.800" in finding.evidence
    assert found(rows(0.99, eval_row(100, 0.52, 0.75))) == []
    assert found(rows(0.9, eval_row(100, 0.6, 0.8))) == []
    # A lesser rise, when it stays.
    good = [train_row(s, **{"train/rewards/accuracies": 0.99}) for s in range(1, STEPS + 1)]

    def after(*losses: float) -> list[str]:
        evals = [eval_row(STEPS, loss, 0.8) for loss in losses]
        return [f.id for f in found([*good, *evals])]

    assert after(0.5, 0.53, 0.54, 0.53) == ["overfit"]
    assert after(0.5, 0.53, 0.54) == after(0.5, 0.53, 0.51, 0.53) == after(0.53, 0.52, 0.51) == []
    # Sets are compared with themselves.
    assert found(rows(0.99, eval_row(100, 0.9, 0.4, "other"))) == []


def test_the_same_pairs_again_are_no_more_evidence() -> None:
    """31% of 64 pairs lie within a standard error of 35%, however often they are seen; of 6,400 pairs they do not."""
    share = {"train/reference/accuracies": 0.31, "train/reference/accuracies_per_token": 0.31}
    assert [f.id for f in found(run(lambda step: share))] == ["labels-flipped"]
    assert found(run(lambda step: share | {"epoch": float(step)})) == []
    stuck = {"train/rewards/accuracies": 0.56}
    assert [f.id for f in found(run(lambda step: stuck))] == ["accuracy-stuck"]
    assert found(run(lambda step: stuck | {"epoch": float(step)})) == []


def test_the_first_rows_count_their_own_pairs() -> None:
    """Flipped labels show in the run's first rows, however long it has gone on since."""
    history = History(FACTS)
    for row in run(lambda step: {}):
        history.add(row)
    first = history.first()
    assert (history.pairs(first), history.distinct_pairs(first)) == (G * len(first), G * len(first))
    assert history.pairs(history.train[50:60]) == 10 * G


def test_hard_pairs_are_no_wrong_labels() -> None:
    """A quarter of the margins below 0 as a bell curve has them, and as flipped labels do."""
    bell = [NormalDist(0.67, 1).inv_cdf((i + 0.5) / 256) for i in range(256)]
    assert sum(m < 0 for m in bell) == 64
    assert found(run(lambda step: {"train/rewards/margins_histogram": histogram(bell)})) == []
    flipped = [
        m if i % 4 else -m for i, m in enumerate(NormalDist(1.4, 0.3).inv_cdf((i + 0.5) / 256) for i in range(256))
    ]
    (finding,) = found(run(lambda step: {"train/rewards/margins_histogram": histogram(flipped)}))
    assert finding.id == "noisy-labels"


def test_other_evidence_for_length() -> None:
    """Hardly a pair whose chosen response is the shorter one; accuracies far apart."""
    only_longer = {
        "train/lengths/chosen_longer": 0.97,
        "train/lengths/chosen_shorter": 0.02,
        "train/rewards/accuracies": 0.95,
        "train/rewards/margins_by_length": 0.1,
    }
    (finding,) = found(run(lambda step: only_longer))
    assert "98% of the pairs" in finding.evidence
    apart = {"train/rewards/accuracies_chosen_longer": 0.9, "train/rewards/accuracies_chosen_shorter": 0.3}
    (finding,) = found(run(lambda step: apart))
    assert "0.90 on pairs whose chosen" in finding.evidence
    # Until the middle of the run a policy may like one style more, and so one length.
    assert found(run(lambda step: apart if step < 60 else {})) == []


def test_without_a_reference_the_first_rows_are_the_start() -> None:
    """A loss whose reward is below 0 from the start, and whose loss has no closed form there."""

    def bare(step: int, **changes: Any) -> Row:
        row = train_row(step, **{"train/rewards/chosen": -1.0, "train/rewards/rejected": -2.0})
        row |= {"train/logps/accuracies": 0.5, "train/logps/accuracies_per_token": 0.5}
        return {k: v for k, v in row.items() if "logratio" not in k and "reference" not in k} | changes

    facts = RunFacts(STEPS, 1, None)
    steps = range(1, STEPS + 1)
    assert found([bare(s) for s in steps], facts) == []
    (finding,) = found([bare(s, **{"train/logps/chosen_per_token": -1 - 0.021 * s}) for s in steps], facts)
    assert (finding.id, finding.step) == ("chosen-falls", 34)
    (finding,) = found([bare(s, **{"train/loss": 2.0 if s < 50 else 4.0}) for s in steps], facts)
    assert finding.id == "diverging"
    flipped = {"train/logps/accuracies": 0.1, "train/logps/accuracies_per_token": 0.1}
    (finding,) = found([bare(s, **(flipped if s < 20 else {})) for s in steps], facts)
    assert finding.id == "labels-flipped"


def test_a_rule_speaks_again_only_when_it_has_recovered() -> None:
    """A gap shorter than a window is no recovery."""

    def slow(*spans: tuple[int, int]) -> list[Row]:
        return run(
            lambda s: {"perf/slowest_rank": 1, "perf/slowest_rank_seconds": 1 + any(a <= s <= b for a, b in spans)}
        )

    assert [f.step for f in found(slow((1, 40)))] == [3 * WINDOW]
    # A window turns when half of it has changed.
    assert [f.step for f in found(slow((1, 40), (48, 100)))] == [3 * WINDOW]
    assert [f.step for f in found(slow((1, 40), (70, 100)))] == [3 * WINDOW, 95]
    assert findings(slow((1, 40)), FACTS, Health())[1] == set()
    assert findings(slow((1, 100)), FACTS, Health())[1] == {"slow-rank"}


def slow_rows(seconds: Callable[[], tuple[float, float]], **changes: float) -> list[Row]:
    """Of two ranks with these seconds of their own work."""

    def of(step: int) -> dict[str, Any]:
        both = seconds()
        return {
            "perf/slowest_rank": int(both[1] > both[0]),
            "perf/slowest_rank_seconds": max(both),
            "perf/other_ranks_seconds": min(both),
            **changes,
        }

    return run(of)


def test_a_busy_machine_is_no_slow_rank() -> None:
    """Ranks that other processes interrupt, each for a while more than the other one; and one that is slow beside."""

    def noisy(draw: random.Random, slow: float) -> Callable[[], tuple[float, float]]:
        turn = [0]

        def seconds() -> tuple[float, float]:
            turn[0] += 1
            more = 1.4 if turn[0] % 40 < 20 else 1.0  # rank 0 shares its processor for a window and a half
            return more * draw.lognormvariate(0, 0.35), slow * draw.lognormvariate(0, 0.35)

        return seconds

    for seed in range(20):
        assert found(slow_rows(noisy(random.Random(seed), 1.0))) == []
        (finding,) = found(slow_rows(noisy(random.Random(seed), 4.0)))
        assert (finding.id, finding.evidence[:7]) == ("slow-rank", "Rank 1 ")


def test_a_rank_with_more_to_do_or_a_moment_of_waiting_is_not_slow() -> None:
    double = lambda: (2.0, 1.0)  # noqa: E731
    assert [f.id for f in found(slow_rows(double))] == ["slow-rank"]
    # Three pairs on two ranks.
    assert found(slow_rows(double, **{"perf/slowest_rank_load": 2.0})) == []
    assert [f.id for f in found(slow_rows(double, **{"perf/slowest_rank_load": 0.5}))] == ["slow-rank"]
    # Milliseconds of waiting for data, as on GPUs, in a step of 20 seconds.
    assert found(slow_rows(double, **{"perf/step_seconds": 20.0})) == []
    bare = [{k: v for k, v in row.items() if k != "perf/slowest_rank_load"} for row in slow_rows(double)]
    assert found(bare) == []


# As the demonstration's SFT run and its DPO run had it, in GiB at every tenth of the run.
FILLING = (0.479, 0.527, 0.530, 0.534, 0.538, 0.541, 0.543, 0.545, 0.547, 0.550, 0.551)
ONE_BLOCK = (0.666, 0.670, 0.733, 0.733, 0.733, 0.734, 0.734, 0.735, 0.739, 0.739, 0.740)


def memory_rows(gib: Callable[[float], float], rows: int) -> list[Row]:
    """gib: of the part of the run."""
    return [train_row(s, **{"perf/memory_gib": gib(s / rows), "pairs_seen": G * s}) for s in range(1, rows + 1)]


@pytest.mark.parametrize("steps", [60, 100, 225, 2000])
def test_memory_that_fills_its_pools_is_no_leak(steps: int) -> None:
    """A warm-up, a block more now and then; but a leak of some MiB a step, soon or late, is one."""

    def creeps(gib: Callable[[float], float]) -> int | None:
        """The first step with evidence."""
        history = History(RunFacts(steps))
        for row in memory_rows(gib, steps):
            history.add(row)
            if memory_creep(history, Health()):
                return history.steps_done
        return None

    tenths = [i / 10 for i in range(11)]
    for known in (FILLING, ONE_BLOCK):
        assert creeps(lambda part, known=known: float(np.interp(part, tenths, known))) is None
    assert creeps(lambda part: 30.0 if part < 0.5 else 36.0) is None
    assert creeps(lambda part: 20.0 + 10.0 * (1 - math.exp(-30 * part))) is None
    mib = steps / 1024
    step = creeps(lambda part: 0.6 + 4 * mib * part)
    assert step is not None
    assert step <= max(60, 0.6 * steps)
    if steps == 2000:
        step = creeps(lambda part: 30.0 + 3 * mib * part)  # slow beside what is held, and fatal in the end
        assert step is not None
        assert step <= 1000
        step = creeps(lambda part: 30.0 + 40 * mib * max(0.0, part - 0.5))  # begins late
        assert step is not None
        assert 1000 < step <= 1300


def test_a_usual_norm_is_not_compared_with_the_whole_run() -> None:
    """At a resume or for a report all rows are looked at in turn, and there may be a hundred thousand."""

    class Counted(list[Row]):
        read = 0

        def __getitem__(self, at: Any) -> Any:
            found = super().__getitem__(at)
            Counted.read += len(found) if isinstance(at, slice) else 1
            return found

    history = History(FACTS)
    history.train = Counted(run(lambda step: {}, last=3000))
    assert gradient_spike(history, Health()) is None
    assert Counted.read < 100


def test_thresholds_are_the_configuration() -> None:
    rows = run(ILL["chosen-falls"])
    assert found(rows, chosen_fall=2.0) == []
    assert found(rows, chosen_fall=0.1)[0].step < found(rows)[0].step


def test_a_row_without_metrics_breaks_nothing() -> None:
    """As a step that was skipped leaves one."""
    bare = {k: v for k, v in train_row(50).items() if not k.startswith("train/")}
    rows = run(lambda step: {})
    rows[49] = bare | {"train/grad_norm": float("nan")}
    assert found(rows) == []
    assert found([rows[49] | {"step": 1}]) == []
    assert found([{k: v for k, v in row.items() if "rewards" not in k} for row in rows]) == []  # of SFT


def test_a_resume_neither_repeats_nor_loses_a_finding(tmp_path: Path) -> None:
    """Killed after the row that makes a finding and before it is told; then after a later one was told and cut back."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    rows = run(lambda step: ILL["chosen-falls"](step) | (ILL["slow-rank"](step) if step > 70 else {}))
    told: list[tuple[str, int]] = []
    said: list[str] = []

    def watch() -> Watch:
        def tell(new: list[HealthFinding], all_of_them: list[HealthFinding]) -> None:
            told.extend((f.id, f.step) for f in new)
            said.extend(f.id for f in new)

        return Watch(metrics, FACTS, Health(), list(told), tell)

    def append(first: int, last: int, follower: Watch | None) -> None:
        for row in rows[first - 1 : last]:
            metrics.append(
                **{k: row[k] for k in ("kind", "step", "epoch", "pairs_seen")},
                metrics={k: v for k, v in row.items() if "/" in k},
            )
            if follower is not None:
                follower.look()

    append(1, 50, watch())
    assert said == []
    append(51, 60, None)  # the finding is in the rows, and nobody heard of it
    second = watch()
    second.look()
    assert said == ["chosen-falls"]
    append(61, 97, second)
    assert said == ["chosen-falls", "slow-rank"]
    metrics.truncate_to(75)  # both findings were told; the second one's row is gone
    third = watch()
    third.look()
    assert [f.id for f in third.found] == ["chosen-falls"]
    append(76, 100, third)
    assert [f.id for f in third.found] == ["chosen-falls", "slow-rank"] == said
    whole, _ = findings(rows, FACTS, Health())
    assert third.found == whole
    json.dumps([f.as_json() for f in whole])


def test_other_thresholds_at_a_resume_tell_nothing_twice(tmp_path: Path) -> None:
    """The same fall is seen in another row then: with a longer run its window is longer."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    said: list[tuple[str, int]] = []

    def start(facts: RunFacts, **thresholds: float) -> Watch:
        def tell(new: list[HealthFinding], all_of_them: list[HealthFinding]) -> None:
            said.extend((f.id, f.step) for f in new)

        return Watch(metrics, facts, Health(**thresholds), list(said), tell)

    for row in run(lambda s: ILL["chosen-falls"](s) | {"train/saturated": 0.99 if s > 60 else 0.0}):
        keys = {k: row[k] for k in ("kind", "step", "epoch", "pairs_seen")}
        metrics.append(**keys, metrics={k: v for k, v in row.items() if "/" in k})
    start(FACTS).look()
    told = list(said)
    assert [rule for rule, _ in told] == ["chosen-falls", "saturated"]
    start(RunFacts(2 * STEPS, 1, 0.693)).look()
    start(FACTS, chosen_fall=0.3).look()
    assert said == told
    # One that is new by the new threshold is told.
    start(FACTS, stuck_accuracy=0.9).look()
    assert [rule for rule, _ in said[len(told) :]] == ["accuracy-stuck"]
