"""How sure an accuracy is, and what is left of it without length."""

import pytest

from prefopt_dist.monitoring.statistics import evaluation_text, wilson, with_intervals


def test_wilsons_interval() -> None:
    """Against the published values of Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (wins, n), interval in published.items():
        assert wilson(wins / n, n) == pytest.approx(interval, abs=5e-5)
    assert wilson(1.0, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


FOUND = {
    "eval/loss": 0.5,
    "eval/rewards/accuracies": 0.75,
    "eval/rewards/accuracies_chosen_longer": 0.9,
    "eval/rewards/accuracies_chosen_shorter": 0.5,
    "eval/rewards/margins": 1.0,
    "eval/rewards/accuracies_of/a.jsonl": 0.8,
    "eval/rewards/margins_of/a.jsonl": 2.0,
    "eval/pairs_of/a.jsonl": 10,
    "eval/rewards/accuracies_of/b.jsonl": 0.7,
    "eval/rewards/margins_of/b.jsonl": 0.0,
    "eval/pairs_of/b.jsonl": 10,
    "eval/rows": 20,
}


def test_every_accuracy_has_its_interval_and_the_whole_one_without_length() -> None:
    more = {name: value for name, value in with_intervals(FOUND).items() if name not in FOUND}
    low, high = wilson(0.8, 10)
    assert more["eval/rewards/accuracies_low_of/a.jsonl"] == low
    assert more["eval/rewards/accuracies_high_of/a.jsonl"] == high
    assert (more["eval/rewards/accuracies_low"], more["eval/rewards/accuracies_high"]) == wilson(0.75, 20)
    assert more["eval/rewards/accuracies_length_controlled"] == 0.7
    assert len(more) == 7
    assert with_intervals({"eval/x/loss": 1.0, "eval/x/rows": 3}) == {"eval/x/loss": 1.0, "eval/x/rows": 3}


def test_a_split_pair_counts_once() -> None:
    """Rated rows that were pairs: two rows of the set are one comparison."""
    found = {"eval/loss": 0.5, "eval/rewards/accuracies": 0.75, "eval/pairs": 10, "eval/rows": 20}
    more = with_intervals(found)
    assert (more["eval/rewards/accuracies_low"], more["eval/rewards/accuracies_high"]) == wilson(0.75, 10)


def test_a_source_may_have_any_name() -> None:
    named = {name.replace("b.jsonl", "rows"): value for name, value in FOUND.items()}
    said = evaluation_text(with_intervals(named)).splitlines()
    assert [line for line in said if not line.startswith(" ")] == ["eval: 20 rows"]
    assert sum(line.startswith("  rows ") for line in said) == 1


def test_the_text_has_a_line_for_each_source() -> None:
    said = evaluation_text(with_intervals(FOUND))
    assert said.splitlines()[:3] == [
        "eval: 20 rows",
        "  rewards/accuracies: 75.0% (95% interval 53.1% to 88.8%)",
        "  rewards/accuracies_length_controlled: 70.0%",
    ]
    assert "  a.jsonl      10 pairs, accuracy 80.0% (95% interval 49.0% to 94.3%), margin 2.0000" in said


def test_a_source_without_a_usable_row() -> None:
    assert (
        "  c.jsonl       0 pairs" in evaluation_text(with_intervals(FOUND | {"eval/pairs_of/c.jsonl": 0})).splitlines()
    )
