"""Observation of a run: metrics, loggers, health rules, progress and messages."""
