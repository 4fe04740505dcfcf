"""Adapters for scripts written for other libraries."""
