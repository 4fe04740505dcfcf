"""Tracing: finds the equations of a loss that are linear in a parameter."""
