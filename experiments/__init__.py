"""The reproduction of NG+: tasks, recipes, training and the analysis of what it recorded."""
