"""Benchmarks: the cost of a step beside TRL's DPOTrainer and beside the least number of operations, and others."""
