"""Mechanisms: how noise is added to the clipped sum, and a private histogram of norms."""

from dpoptax.mechanisms._base import Mechanism
from dpoptax.mechanisms._discrete_gaussian import DiscreteGaussian
from dpoptax.mechanisms._gaussian import Gaussian
from dpoptax.mechanisms._histogram import norm_histogram

__all__ = ["Mechanism", "Gaussian", "DiscreteGaussian", "norm_histogram"]
