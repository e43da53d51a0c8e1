"""The reference's log-probs: the store on disk, the plan of the first pass, the pass, and the step-0 check."""
