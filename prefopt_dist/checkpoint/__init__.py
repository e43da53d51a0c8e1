"""Checkpoints, which are committed whole or not at all, their loading, resharding and export, and the run folder."""
