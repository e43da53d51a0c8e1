"""The policy and the reference: loading, shared-prefix attention, the log-prob head, the scoring module."""
