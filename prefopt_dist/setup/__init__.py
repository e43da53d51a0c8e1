"""What several stages start with: models, data, the reference, rewards, the run folder, checked and put together."""
