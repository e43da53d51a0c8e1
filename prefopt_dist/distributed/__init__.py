"""Ranks that decide together, and DeepSpeed's ZeRO-3 engines."""
