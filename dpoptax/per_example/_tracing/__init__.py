"""Tracing: where parameters meet data inside a loss."""
