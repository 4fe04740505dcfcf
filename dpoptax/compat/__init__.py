"""Adapters for scripts written for other libraries."""

from dpoptax.compat import d3p, jax_privacy

__all__ = ["d3p", "jax_privacy"]
