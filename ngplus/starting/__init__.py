"""Settings to start with, from a model and one batch."""
