"""Mechanisms: how the noise on the clipped sum is made."""

from dpoptax.mechanisms._base import Mechanism
from dpoptax.mechanisms._discrete_gaussian import DiscreteGaussian
from dpoptax.mechanisms._gaussian import Gaussian
from dpoptax.mechanisms._histogram import norm_histogram

__all__ = ["DiscreteGaussian", "Gaussian", "Mechanism", "norm_histogram"]
