"""From rows to micro-batches: the global order of the rows, the layout over the ranks, packed rows."""
