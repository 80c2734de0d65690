"""The optimizers that a recipe can name, and their schedules."""
