"""Read prompts, sample responses, score them with rewards, and make preference pairs of them."""
