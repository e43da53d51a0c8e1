"""A built-in example: a small synthetic task whose true reward is known, and the whole job on it."""
