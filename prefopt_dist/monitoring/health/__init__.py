"""Health rules: from the rows of `metrics.jsonl` to findings, each with its evidence and what to do."""

from prefopt_dist.monitoring.health.history import HealthFinding, Level, RunFacts
from prefopt_dist.monitoring.health.rules import RULES, Rule
from prefopt_dist.monitoring.health.watch import Watch, findings

__all__ = ["RULES", "HealthFinding", "Level", "Rule", "RunFacts", "Watch", "findings"]
