"""Mechanisms: how the noise on the clipped sum is made."""

from dpoptax import _serialize
from dpoptax.mechanisms._base import Mechanism
from dpoptax.mechanisms._discrete_gaussian import DiscreteGaussian
from dpoptax.mechanisms._gaussian import Gaussian
from dpoptax.mechanisms._histogram import norm_histogram

# What JSON can hold. A new mechanism joins by one line.
_serialize.register(Gaussian)
_serialize.register(DiscreteGaussian)
_serialize.register_interface(Mechanism, describe_by=("caveat",))

__all__ = ["DiscreteGaussian", "Gaussian", "Mechanism", "norm_histogram"]
