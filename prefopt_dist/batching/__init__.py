"""From rows to micro-batches: the global order, the layout over ranks, packed rows."""
