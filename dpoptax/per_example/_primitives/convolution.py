"""Convolutions: the parameter is the kernel."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from dpoptax.per_example._primitives.base import HIGHEST, LinearPrimitive
from dpoptax.per_example._primitives.fast_convolution import convolve
from dpoptax.per_example._tracing.site import Site


def _features(site: Site) -> int:
    return max(1, site.parameter.shape[site.params["dimension_numbers"].rhs_spec[0]])


def _num_terms(site: Site) -> int:
    return max(1, math.prod(site.output.shape) // _features(site))


def _multiplications(site: Site) -> float:
    return math.prod(site.output.shape) / _features(site)


def _run(eqn: Any, values: Sequence[Any]) -> Array:
    return convolve(eqn.params, *values)


def _bind_float32(site: Site, parameter: Array, operands: tuple[Array, ...]) -> Array:
    in_float32 = {"precision": (HIGHEST, HIGHEST), "preferred_element_type": None}
    (images,) = operands
    return convolve({**site.params, **in_float32}, images, parameter)


CONVOLUTION = LinearPrimitive(
    primitive=jax.lax.conv_general_dilated_p,
    saved_operands={1: (0,)},
    num_terms=_num_terms,
    multiplications=_multiplications,
    bind_float32=_bind_float32,
    run=_run,
    # vmap turns kernel gradients into one convolution with a group per example, and XLA multiplies
    # across the groups by zero: NaN in one example becomes NaN in all.
    spreads_nan=True,
)
