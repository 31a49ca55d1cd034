"""Which rows an evaluation asks: a run's own held-out rows, or all rows of a file; and which of them were trained."""
