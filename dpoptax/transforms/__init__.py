"""Optax gradient transformations that make per-example gradients private, and what follows them."""

from dpoptax.transforms._adam_bc import scale_by_adam_bc
from dpoptax.transforms._aliases import dp_adam, dp_adam_bc, dp_sgd
from dpoptax.transforms._average import average_params, averaged_params
from dpoptax.transforms._chain import chain
from dpoptax.transforms._disk import disk
from dpoptax.transforms._low_pass import low_pass
from dpoptax.transforms._privatize import privatize
from dpoptax.transforms._scale_then_privatize import scale_then_privatize

__all__ = [
    "privatize",
    "chain",
    "dp_sgd",
    "dp_adam",
    "dp_adam_bc",
    "scale_by_adam_bc",
    "scale_then_privatize",
    "disk",
    "low_pass",
    "average_params",
    "averaged_params",
]
