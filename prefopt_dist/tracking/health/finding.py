"""What a rule has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One finding; it stands in run.json as it is here."""

    id: str
    """The rule's"""
    step: int
    """Of the row that made the evidence whole"""
    level: Level
    title: str
    evidence: str
    """With the numbers and the threshold"""
    remedy: str

    def as_json(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)

    def text(self) -> str:
        """For the log."""
        return f"health: {self.level} [{self.id}] at step {self.step}: {self.title}. {self.evidence}. {self.remedy}"
