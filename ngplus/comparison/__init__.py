"""Whether what was captured of a weight makes up its gradient: the entries of both, and sums of them, compared."""
