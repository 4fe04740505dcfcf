"""Adapters for scripts written for other libraries."""

from dpoptax.compat import d3p

__all__ = ["d3p"]
