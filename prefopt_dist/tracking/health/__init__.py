"""Health rules: from the rows of `metrics.jsonl` to findings, each with its evidence and what to do."""

from prefopt_dist.tracking.health.finding import Finding, Level
from prefopt_dist.tracking.health.history import RunFacts
from prefopt_dist.tracking.health.rules import RULES, Rule
from prefopt_dist.tracking.health.watch import Watch, findings

__all__ = ["RULES", "Finding", "Level", "Rule", "RunFacts", "Watch", "findings"]
