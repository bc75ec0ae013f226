"""Studies, which compare recipes: tasks with tiny models, the runner, reports with intervals."""
