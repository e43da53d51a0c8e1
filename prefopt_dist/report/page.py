"""The HTML page of a run or a sweep, and the banner at its top."""

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
"""The metrics whose first and last values the page shows."""


def run_page(record: Record) -> str:
    """Return the HTML page of one run."""
    return _render(
        "run.html.j2",
        title=record.name,
        record=record,
        verdict=banner(record),
        answers=section(record),
        numbers=_numbers(record),
        charts=run_charts(record),
        checked=[rule for rule in RULES if rule.id not in {f.id for f in record.findings}],
    )


def sweep_page(records: Sequence[Record]) -> str:
    """Return the HTML page of several runs."""
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
    """Return the first and last values of the metrics `SHOWN`, in training and in each evaluated set."""
    table = []
    sets = [("training", "train/", record.train)]
    sets += [(f"evaluation {n}".rstrip(), f"eval/{n}/".replace("//", "/"), record.evals) for n in record.eval_sets]
    for label, prefix, rows in sets:
        for name in SHOWN:
            values = [row[prefix + name] for row in rows if prefix + name in row]
            if values:
                table.append({"of": label, "name": name, "first": values[0], "last": values[-1]})
    return table


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
    """Return a float with four digits and at most four decimals, a dash for None, and any other value as text."""
    if isinstance(value, float):
        return f"{round(value, 4) + 0.0:.4g}" if abs(value) >= 5e-5 or value == 0 else f"{value:.0e}"
    return "–" if value is None else str(value)


def breakable(name: str) -> str:
    """Return the name with a possible line break after each slash and underscore."""
    return re.sub(r"([/_])(?=[A-Za-z])", "\\1\u200b", name)


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested facts as dotted names and values; a list of lists or mappings appears as its length."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            rows.append((name, f"{len(value)} entries"))
        else:
            rows.append((name, ", ".join(map(str, value)) if isinstance(value, list) else number(value)))
    return rows


RULE_OF_VERDICT = {"collapsed": "answers-collapsed", "worse": "answers-worse"}
"""The rule whose finding a bad verdict repeats."""
NOT_JUDGED = "not judged"


def banner(record: Record) -> dict[str, str]:
    """Return the text about the state of the run, and its mood: good, poor, or open.

    The mood is good only for a model whose answers were found to be better: loss and accuracy may be perfect while the
    model writes nonsense.
    """
    warnings = {f.id: f.title for f in record.findings if f.level == "warning"}
    active = {rule: title for rule, title in warnings.items() if rule in record.active}
    if record.judged is not None:
        return _verdict_banner(record.judged["verdict"], record.judged["verdict_text"], warnings, active)
    if active:
        return {"mood": "poor", "text": f"Not healthy: {_active_text(active, '. ')}."}
    if not record.train:
        return {"mood": "open", "text": "Nothing to judge yet: the run has no metrics of training."}
    state = "The run has recovered: no warning is active any more" if warnings else "No rule has a warning"
    when = "was not judged" if record.done else "is judged at the end of the run"
    return {"mood": "open", "text": f"{state}. Whether the answers are better {when}."}


def _verdict_banner(word: str, text: str, warnings: dict[str, str], active: dict[str, str]) -> dict[str, str]:
    """Return the banner of a run with a verdict: the verdict, then the warnings that it does not repeat.

    Args:
        word: the verdict's word.
        text: the verdict's text.
        warnings: titles of all warnings by the id of their rule.
        active: those whose rules have not recovered.
    """
    verdict = f"{text[:1].upper()}{text[1:]}."
    if word == NOT_JUDGED:
        verdict = f"Done; whether the answers are better was not judged: {text.removeprefix(f'{word}: ')}."
    others = {rule: title for rule, title in active.items() if rule != RULE_OF_VERDICT.get(word)}
    bad = word in RULE_OF_VERDICT
    if others:
        conjunction = "But " if word == "better" else "And " if bad else ""
        rules = f"{conjunction}{_active_text(others, ': ')}."
    elif active or bad:
        rules = ""
    else:
        rules = "No warning is active any more." if warnings else "No rule has a warning."
    mood = "poor" if bad else "good" if word == "better" else "open"
    if others:
        mood = "open" if word == "better" else "poor"
    return {"mood": mood, "text": f"{verdict} {rules[:1].upper()}{rules[1:]}".strip()}


def _active_text(warnings: dict[str, str], separator: str) -> str:
    count = "one warning is active" if len(warnings) == 1 else f"{len(warnings)} warnings are active"
    return f"{count}{separator}{'; '.join(warnings.values())}"
