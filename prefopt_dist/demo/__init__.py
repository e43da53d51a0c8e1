"""An embedded example: a small world whose true preference is known, and the whole job on it."""
