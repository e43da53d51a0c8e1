"""Rewards: functions and models that give a response a number; their weighted mean is what pairs are made by."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from prefopt_dist.errors import UserError, shortened
from prefopt_dist.files import checksum
from prefopt_dist.generation.prompts import Prompt


@dataclass(frozen=True)
class Bad:
    """What stands for a number that a reward did not give."""

    why: str


class Reward(Protocol):
    """Scores responses; one whole copy a rank."""

    def score(self, asked: Sequence[tuple[Prompt, str]]) -> list[float | Bad]:
        """A finite number for each prompt and response, in order, or what went wrong."""
        ...

    def close(self) -> None:
        """Gives memory back."""
        ...


class FunctionReward:
    """score(prompt, response, row) → a number.

    prompt: the text or the list of messages; response: its text; row: all fields of the prompt's row, such as the
    right answer. The same arguments must give the same number, or a restart would make other pairs.
    """

    def __init__(self, function: Callable[[Any, str, dict[str, Any]], Any]) -> None:
        self._function = function

    def score(self, asked: Sequence[tuple[Prompt, str]]) -> list[float | Bad]:
        """See Reward."""
        return [self._one(prompt, response) for prompt, response in asked]

    def _one(self, prompt: Prompt, response: str) -> float | Bad:
        try:
            value = self._function(prompt.prompt, response, prompt.row)
        except Exception as e:  # somebody's program: it can raise anything
            return Bad(f"raised {type(e).__name__}: {e}")
        if not isinstance(value, Real):
            return Bad(f"returned {shortened(repr(value))}, which is no number")
        try:
            return finite(float(value))
        except OverflowError:
            return Bad("returned a number beyond every float, which is no finite number")

    def close(self) -> None:
        """See Reward."""


def finite(value: float) -> float | Bad:
    """The value, or what is wrong with it."""
    return value if math.isfinite(value) else Bad(f"returned {value}, which is no finite number")


def find_function(path: str, key: str) -> Callable[[Any, str, dict[str, Any]], Any]:
    """The function that `module:name` names; UserError under the dotted key where there is none."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"{key}: got {path!r}, must be module:name; write it like my_rewards:score")
    here = os.getcwd()
    if here not in sys.path:
        # Jobs of Slurm and images run without it (PYTHONSAFEPATH). Last, so that a clone here does not come before
        # the code that runs.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # somebody's program: its import can raise anything
        raise UserError(
            f"{key}: the module of {path!r} cannot be imported ({type(e).__name__}: {e}); it must lie in the folder "
            "that the job is started in, or on PYTHONPATH"
        ) from e
    if name not in vars(module):
        near = difflib.get_close_matches(name, vars(module), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"define it in {module.__file__}"
        raise UserError(f"{key}: the module {module_name} has no {name!r}; {hint}")
    function = vars(module)[name]
    if not callable(function):
        raise UserError(f"{key}: {path!r} is a {type(function).__name__}, must be a function; name a function")
    found: Callable[[Any, str, dict[str, Any]], Any] = function
    return found


def function_identity(path: str) -> dict[str, str]:
    """What the numbers of a function depend on, as far as can be seen: its name and its module's file."""
    file = importlib.import_module(path.partition(":")[0]).__file__
    return {"function": path, "source": checksum(Path(file)) if file else ""}


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean."""
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
