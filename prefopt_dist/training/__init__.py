"""Training: the step, the loop around it, evaluation, checkpoints, stopping, the run folder, export."""
