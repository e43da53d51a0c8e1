"""A cut of a model's configuration: every kind of its layers, few layers, few experts, a small vocabulary.

What a short sequence never reaches (windows, chunks, the lengths from which rotary embeddings are scaled) is cut too,
so that the sequences of the proof cross it. Widths stay as they are up to a limit of bytes; beyond it heads and widths
are divided. Each change is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from transformers import PreTrainedConfig

from prefopt_dist.model.proof import layers, reach, widths
from prefopt_dist.model.proof.kinds import build_on_meta

MOST_BYTES = 2 * 2**30
"""Largest size of the float32 weights of a cut whose widths are the model's own."""

MOST_TEXT = 300
"""Characters of a family's own error in a message."""


class CannotCut(Exception):
    """A configuration of which no cut can be built; its text says why."""


@dataclass(frozen=True)
class Cut:
    """A configuration that is cut."""

    config: PreTrainedConfig
    changes: tuple[str, ...]
    """What was cut, each as `field: old → new`."""


def cuts(config: PreTrainedConfig, max_length: int | None = None, most_bytes: int = MOST_BYTES) -> Iterator[Cut]:
    """Yield cuts of a model's configuration, the widest first.

    Args:
        config: of a causal language model.
        max_length: tokens of the run's longest sequence; None where unknown, so that it may be any.
        most_bytes: largest size of the float32 weights.

    Raises:
        CannotCut: no cut of the model can be built.
    """
    error: Exception | None = None
    try:
        few = reach.limit(layers.cut_layers(config).to_dict(), max_length)
    except Exception as e:  # whatever the family's own code raises
        raise CannotCut(text_of(e)) from e
    found = False
    for heads, sizes in widths.factors(few):
        try:
            smaller = type(config).from_dict(widths.divide(few, heads, sizes))
            held = 4 * sum(p.numel() for p in build_on_meta(smaller).parameters())
        except Exception as e:  # a family may need certain ratios, so that the next factors are tried
            error = error or e
            continue
        if held <= most_bytes:
            found = True
            yield Cut(smaller, tuple(_changes(config.to_dict(), smaller.to_dict())))
    if not found:
        raise CannotCut(f"more than {most_bytes} bytes of weights" if error is None else text_of(error)) from error


def text_of(error: Exception) -> str:
    """Return what a family's own code raised, in one line."""
    return f"{type(error).__name__}: {shorten(str(error), MOST_TEXT)}"


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name in sorted(old.keys() & new.keys()):
        if old[name] == new[name]:
            continue
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            found += _changes(old[name], new[name], f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}: {_short(old[name])} → {_short(new[name])}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
