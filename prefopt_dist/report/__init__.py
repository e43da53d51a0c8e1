"""A page about a run, or about several side by side, made from their folders alone."""
