"""Optax gradient transformations that make per-example gradients private."""

from dpoptax.transforms._aliases import dp_adam, dp_sgd
from dpoptax.transforms._privatize import privatize

__all__ = ["privatize", "dp_sgd", "dp_adam"]
