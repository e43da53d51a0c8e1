"""The one sentence that stands first on a run's page."""

from __future__ import annotations

from prefopt_dist.report.record import Record

SAYS_THE_SAME = {"collapsed": "answers-collapsed", "worse": "answers-worse"}
"""The rule whose finding a verdict repeats."""
NOT_JUDGED = "not judged"


def verdict(record: Record) -> dict[str, str]:
    """How the run is, and its mood: good, poor, or open.

    Good is only a model whose answers were found better: a perfect loss and accuracy have gone with nonsense.
    """
    warnings = {f.id: f.title for f in record.found if f.level == "warning"}
    standing = {rule: title for rule, title in warnings.items() if rule in record.active}
    if record.judged is not None:
        return _of_answers(record.judged["verdict"], record.judged["verdict_text"], warnings, standing)
    if standing:
        return {"mood": "poor", "text": f"Not well: {_standing(standing, '. ')}."}
    if not record.train:
        return {"mood": "open", "text": "Nothing to judge yet: the run has no row of training."}
    state = "It has recovered: every warning below is over" if warnings else "No rule has a warning"
    when = "was not judged" if record.done else "is seen at the end"
    return {"mood": "open", "text": f"{state}. Whether the answers are better {when}."}


def _of_answers(word: str, text: str, warnings: dict[str, str], standing: dict[str, str]) -> dict[str, str]:
    """The verdict on the answers, then the other warnings."""
    said = f"{text[:1].upper()}{text[1:]}."
    if word == NOT_JUDGED:
        said = f"Done; whether the answers are better was not judged: {text.removeprefix(f'{word}: ')}."
    others = {rule: title for rule, title in standing.items() if rule != SAYS_THE_SAME.get(word)}
    bad = word in SAYS_THE_SAME
    if others:
        but = "But " if word == "better" else "And " if bad else ""
        rules = f"{but}{_standing(others, ': ')}."
    elif standing or bad:
        rules = ""
    else:
        rules = "Every warning below is over." if warnings else "No rule has a warning."
    mood = "poor" if bad else "good" if word == "better" else "open"
    if others:
        mood = "open" if word == "better" else "poor"
    return {"mood": mood, "text": f"{said} {rules[:1].upper()}{rules[1:]}".strip()}


def _standing(warnings: dict[str, str], link: str) -> str:
    number = "one warning stands" if len(warnings) == 1 else f"{len(warnings)} warnings stand"
    return f"{number}{link}{'; '.join(warnings.values())}"
