"""Health rules, which turn the rows of `metrics.jsonl` into findings with their evidence and a remedy."""

from prefopt_dist.monitoring.health.history import HealthFinding, Level, RunFacts
from prefopt_dist.monitoring.health.rules import RULES, Rule
from prefopt_dist.monitoring.health.watch import Watch, findings

__all__ = ["RULES", "HealthFinding", "Level", "Rule", "RunFacts", "Watch", "findings"]
