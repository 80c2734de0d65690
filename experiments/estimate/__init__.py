"""What training a recipe would take, in seconds and memory, from a few steps on the device at hand."""
