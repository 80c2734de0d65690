"""From the run records on disk to tables and figures; never starts a run."""
