"""The best accuracy that we know how to reach with dpoptax at a given epsilon, task by task."""
