"""From prompts to responses, rewards and pairs."""
