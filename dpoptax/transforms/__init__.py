"""Optax gradient transformations that make per-example gradients private."""

from dpoptax.transforms._aliases import dp_adam, dp_sgd
from dpoptax.transforms._privatize import PrivatizeState, privatize

__all__ = ["PrivatizeState", "privatize", "dp_sgd", "dp_adam"]
