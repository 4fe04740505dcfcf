"""What is kept of a site for a batch, and the exact gradient that follows from it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax._precision import widen
from dpoptax.per_example._primitives import linear_primitive
from dpoptax.per_example._tracing.site import Site

HIGHEST = jax.lax.Precision.HIGHEST


class Factors(NamedTuple):
    """The inputs of a site and the cotangents of its output.

    Attributes:
        operands: arrays `(batch, *levels, *operand.shape)`, an axis per scan around the site.
        cotangent: array `(batch, *levels, *output.shape)`.
    """

    operands: tuple[Array, ...]
    cotangent: Array


def leaf_gradient(
    sites: Sequence[Site], factors: Sequence[Factors], spec: jax.ShapeDtypeStruct
) -> Array:
    """Returns the gradient of a leaf, summed over the batch of factors, in float32 or wider.

    It is the ordinary transpose of the equations, at the highest precision: one large product per
    site, whatever the batch.
    """
    zeros = widen(jnp.zeros(spec.shape, spec.dtype))
    total = zeros
    for site, (operands, cotangent) in zip(sites, factors, strict=True):
        floats = tuple(_as_float(operand, zeros.dtype) for operand in operands)
        batched = _batched(site, floats, cotangent.shape[0])
        output, pull = jax.vjp(batched, zeros)
        (gradient,) = pull(cotangent.astype(output.dtype))
        total = total + gradient
    return total


def to_leaf(site: Site, gradient: Array, spec: jax.ShapeDtypeStruct) -> Array:
    """Brings the gradient of a site's weight back to the leaf.

    Args:
        site: the site.
        gradient: shaped like the weight, with an axis in front per scan that slices the leaf.
        spec: shape and dtype of the leaf.

    Returns:
        An array shaped like the leaf.
    """
    zeros = jnp.zeros(spec.shape, gradient.dtype)
    _, pull = jax.vjp(lambda leaf: _follow(site, leaf), zeros)
    return pull(gradient)[0]


def _follow(site: Site, leaf: Array) -> Array:
    """The leaf as its site sees it, with an axis in front per scan that slices it."""
    weight, depth = leaf, 0
    for step in site.steps:
        if step.primitive is None:
            depth += 1
        elif step.primitive.name != "convert_element_type":  # precision is float32 throughout

            def move(value: Array, step=step) -> Array:  # type: ignore[no-untyped-def]
                return step.primitive.bind(value, **step.params)

            weight = _nested(move, depth)(weight)
    return weight


def _batched(site: Site, operands: tuple[Array, ...], batch: int) -> Callable[[Array], Array]:
    """The leaf as the only argument of its equation, over the batch and the scans around it."""

    def run(leaf: Array) -> Array:
        mapped: Callable[..., Array]
        linear = linear_primitive(site.primitive)
        assert linear is not None
        mapped = functools.partial(linear.bind_float32, site)
        for scan in reversed(site.scans):
            axes = (0 if scan.sliced else None, 0)
            mapped = jax.vmap(mapped, axes, axis_size=scan.length)
        return jax.vmap(mapped, (None, 0), axis_size=batch)(_follow(site, leaf), operands)

    return run


def _nested(function: Callable[[Array], Array], depth: int) -> Callable[[Array], Array]:
    for _ in range(depth):
        function = jax.vmap(function)
    return function


def _as_float(operand: Array, dtype: Any) -> Array:
    return operand.astype(dtype) if jnp.issubdtype(operand.dtype, jnp.floating) else operand
