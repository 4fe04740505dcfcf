"""One module for each task. Each holds a `Task` in the name TASK."""
