"""Benchmarks: times and memory, measured side by side. Nothing here asserts a time."""
