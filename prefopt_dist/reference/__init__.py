"""The reference's log-probs: the store on disk, the plan of the first pass, and the pass itself."""
