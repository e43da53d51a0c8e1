"""Checkpoints: saved all or not at all, loaded, resharded, exported; the run folder."""
