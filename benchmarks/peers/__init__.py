"""The systems that are measured side by side, each in its own process and environment."""
