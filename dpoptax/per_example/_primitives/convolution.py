"""Convolutions: the parameter is the kernel."""

import math

import jax

from dpoptax.per_example._primitives.base import LinearPrimitive
from dpoptax.per_example._tracing.site import Site


def _features(site: Site) -> int:
    return max(1, site.parameter.shape[site.params["dimension_numbers"].rhs_spec[0]])


def _num_terms(site: Site) -> int:
    return max(1, math.prod(site.output.shape) // _features(site))


def _multiplications(site: Site) -> float:
    return math.prod(site.output.shape) / _features(site)


CONVOLUTION = LinearPrimitive(
    primitive=jax.lax.conv_general_dilated_p,
    saved_operands={1: (0,)},
    num_terms=_num_terms,
    multiplications=_multiplications,
    # vmap turns kernel gradients into one convolution with a group per example, and XLA multiplies
    # across the groups by zero: NaN in one example becomes NaN in all.
    spreads_nan=True,
)
