"""The reproduction of NG+: tasks, recipes, the runner and the analysis of what it recorded."""
