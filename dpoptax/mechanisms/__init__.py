"""Mechanisms: how noise is added to the clipped sum, and private statistics of norms."""

from dpoptax import _serialize
from dpoptax.mechanisms import _strategy, strategies
from dpoptax.mechanisms._base import Mechanism
from dpoptax.mechanisms._correlated import Correlated
from dpoptax.mechanisms._discrete_gaussian import DiscreteGaussian
from dpoptax.mechanisms._gaussian import Gaussian
from dpoptax.mechanisms._histogram import norm_histogram
from dpoptax.mechanisms._norm_quantile import norm_quantile
from dpoptax.mechanisms._state import StatefulMechanism

# What JSON can hold. A new mechanism joins by one line.
_serialize.register(Gaussian)
_serialize.register(DiscreteGaussian)
_serialize.register(Correlated)
_serialize.register_interface(Mechanism, describe_by=("caveat",))
_serialize.register_interface(StatefulMechanism, describe_by=("caveat",))
_serialize.register_interface(_strategy.Strategy, describe_by=("num_steps", "num_bands", "taps"))

__all__ = [
    "Mechanism",
    "StatefulMechanism",
    "Gaussian",
    "DiscreteGaussian",
    "Correlated",
    "strategies",
    "norm_histogram",
    "norm_quantile",
]
