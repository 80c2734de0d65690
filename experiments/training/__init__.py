"""One run: the training loop, its checkpoints, its clocks, its processes."""
