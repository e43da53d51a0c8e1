"""Make one HTML page of a run or a sweep, with the sentence that stands first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefopt_dist.monitoring.health import RULES
from prefopt_dist.report.answers import section
from prefopt_dist.report.record import Record
from prefopt_dist.report.run_charts import run_charts
from prefopt_dist.report.sweep import ANSWERED, differing_keys, sweep_charts, sweep_table

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "logratio/chosen_per_token")
"""Of which the page gives the first and the last value."""


def run_page(record: Record) -> str:
    """The page of one run."""
    return _render(
        "run.html.j2",
        title=record.name,
        record=record,
        verdict=banner(record),
        answers=section(record),
        numbers=_numbers(record),
        charts=run_charts(record),
        checked=[rule for rule in RULES if rule.id not in {f.id for f in record.found}],
    )


def sweep_page(records: Sequence[Record]) -> str:
    """The page of several runs."""
    table = sweep_table(records)
    return _render(
        "sweep.html.j2",
        title=f"{len(records)} runs",
        keys=differing_keys(records),
        table=table,
        answered=[name for name in ANSWERED if any(row[name] is not None for row in table)],
        records=records,
        verdicts={record.path: banner(record) for record in records},
        charts=sweep_charts(records),
    )


def _numbers(record: Record) -> list[dict[str, Any]]:
    """First and last value of what matters, training and each evaluated set."""
    found = []
    sets = [("training", "train/", record.train)]
    sets += [(f"evaluation {n}".rstrip(), f"eval/{n}/".replace("//", "/"), record.evals) for n in record.eval_sets]
    for label, prefix, rows in sets:
        for name in SHOWN:
            values = [row[prefix + name] for row in rows if prefix + name in row]
            if values:
                found.append({"of": label, "name": name, "first": values[0], "last": values[-1]})
    return found


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("prefopt_dist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["flat"] = flat
    environment.filters["breakable"] = breakable
    return environment.get_template(template).render(made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **values)


def number(value: Any) -> str:
    """Four digits of a float, none behind the fourth decimal; all else as it is."""
    if isinstance(value, float):
        return f"{round(value, 4) + 0.0:.4g}" if abs(value) >= 5e-5 or value == 0 else f"{value:.0e}"
    return "–" if value is None else str(value)


def breakable(name: str) -> str:
    """The name with a place to break the line after each slash and underscore."""
    return re.sub(r"([/_])(?=[A-Za-z])", "\\1\u200b", name)


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as dotted names and values; lists by their length where they hold more than scalars."""
    found: list[tuple[str, str]] = []
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            found.append((name, f"{len(value)} entries"))
        else:
            found.append((name, ", ".join(map(str, value)) if isinstance(value, list) else number(value)))
    return found


SAYS_THE_SAME = {"collapsed": "answers-collapsed", "worse": "answers-worse"}
"""The rule whose finding a verdict repeats."""
NOT_JUDGED = "not judged"


def banner(record: Record) -> dict[str, str]:
    """How the run is, and its mood: good, poor, or open.

    Good is only a model whose answers were found better: a perfect loss and accuracy have gone with nonsense.
    """
    warnings = {f.id: f.title for f in record.found if f.level == "warning"}
    standing = {rule: title for rule, title in warnings.items() if rule in record.active}
    if record.judged is not None:
        return _answers_sentence(record.judged["verdict"], record.judged["verdict_text"], warnings, standing)
    if standing:
        return {"mood": "poor", "text": f"Not well: {_standing_sentence(standing, '. ')}."}
    if not record.train:
        return {"mood": "open", "text": "Nothing to judge yet: the run has no row of training."}
    state = "It has recovered: every warning below is over" if warnings else "No rule has a warning"
    when = "was not judged" if record.done else "is seen at the end"
    return {"mood": "open", "text": f"{state}. Whether the answers are better {when}."}


def _answers_sentence(word: str, text: str, warnings: dict[str, str], standing: dict[str, str]) -> dict[str, str]:
    """The verdict on the answers, then the other warnings."""
    said = f"{text[:1].upper()}{text[1:]}."
    if word == NOT_JUDGED:
        said = f"Done; whether the answers are better was not judged: {text.removeprefix(f'{word}: ')}."
    others = {rule: title for rule, title in standing.items() if rule != SAYS_THE_SAME.get(word)}
    bad = word in SAYS_THE_SAME
    if others:
        but = "But " if word == "better" else "And " if bad else ""
        rules = f"{but}{_standing_sentence(others, ': ')}."
    elif standing or bad:
        rules = ""
    else:
        rules = "Every warning below is over." if warnings else "No rule has a warning."
    mood = "poor" if bad else "good" if word == "better" else "open"
    if others:
        mood = "open" if word == "better" else "poor"
    return {"mood": mood, "text": f"{said} {rules[:1].upper()}{rules[1:]}".strip()}


def _standing_sentence(warnings: dict[str, str], link: str) -> str:
    number = "one warning stands" if len(warnings) == 1 else f"{len(warnings)} warnings stand"
    return f"{number}{link}{'; '.join(warnings.values())}"
