"""prefopt_dist: distributed Direct Preference Optimization under DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
