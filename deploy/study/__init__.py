"""Comparisons of recipes: tasks with tiny models, the runner, tables with intervals."""
