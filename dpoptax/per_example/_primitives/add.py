"""Additions: the parameter is a bias. Its gradient is the cotangent and needs no operand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax.per_example._primitives.base import LinearPrimitive
from dpoptax.per_example._tracing.concatenated import Box, Window
from dpoptax.per_example._tracing.site import Site


def _num_terms(site: Site) -> int:
    return max(1, math.prod(site.output.shape) // max(1, math.prod(site.parameter.shape)))


def _multiplications(site: Site) -> float:
    return math.prod(site.output.shape) / max(1, math.prod(site.parameter.shape))


def _windows(eqn: Any, position: int, window: Box) -> tuple[tuple[Window, ...], Window]:
    sizes, result = eqn.invars[position].aval.shape, eqn.outvars[0].aval.shape
    # An axis of size one is repeated: it belongs to the whole axis of the output.
    axes = zip(window, sizes, result, strict=True)
    return (), tuple(part if size == n else (0, n) for part, size, n in axes)


def _bind_float32(site: Site, parameter: Array, operands: tuple[Array, ...]) -> Array:
    # The other operand was not saved. It changes the value and not the derivative.
    return jnp.broadcast_to(parameter, site.output.shape)


ADD = LinearPrimitive(
    primitive=jax.lax.add_p,
    saved_operands={0: (), 1: ()},
    num_terms=_num_terms,
    multiplications=_multiplications,
    windows=_windows,
    bind_float32=_bind_float32,
)
