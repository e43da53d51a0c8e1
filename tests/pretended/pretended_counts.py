"""Waits and copies between host and device, each with the part of the program that asked for it."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

PARTS = {"prefopt_dist": "ours", "deepspeed": "engine", "transformers": "model", "optim": "optimizer"}
"""Names of the parts by the folder in which the innermost frame of one of them stands."""

PASSING = ("<lambda>", "<dictcomp>", "to_device", "_with_tensors", "_map")
"""Functions that only pass a call on, as DeepSpeed's accelerator does"""


class Counts:
    """What was told since the last `take`."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._launched = device.launched()
        self._told: Counter[tuple[str, str, str]] = Counter()
        device.listen(self._note)

    def take(self) -> dict[str, Any]:
        """Return {"launched": kernels, "told": [[part, what, place, times], …]} and begin anew."""
        told, self._told = self._told, Counter()
        before, self._launched = self._launched, self._device.launched()
        return {"launched": self._launched - before, "told": [[*key, times] for key, times in sorted(told.items())]}

    def _note(self, what: str) -> None:
        part, place = _asked_by(sys._getframe(1) if sys._getframe().f_back else None)
        self._told[part, what, place] += 1


def _asked_by(frame: FrameType | None) -> tuple[str, str]:
    """Return the part and the function of the innermost frame that is of a part; autograd's threads have none."""
    while frame is not None:
        folders = frame.f_code.co_filename.split("/")
        for folder, part in PARTS.items():
            passes = "accelerator" in folders or frame.f_code.co_name in PASSING
            if folder in folders and not passes:
                return part, f"{folders[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "none", ""
