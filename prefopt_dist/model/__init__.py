"""The models: loading, attention with shared prompts, the output head that computes log-probs, and the scorer."""
