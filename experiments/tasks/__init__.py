"""The tasks, by name. A new task is one module here, one line in `TASKS` and one TOML a scale."""
