"""Check and assemble what several stages start with: models, data, the reference, rewards and the run folder."""
