"""What a run tells while it works: metrics, Weights & Biases, progress, messages."""
