"""What a step checks and holds off around it: NaN, autocast, the compiler, `Join`, hooks, replaced parameters."""
