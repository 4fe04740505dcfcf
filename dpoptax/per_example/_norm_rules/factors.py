"""The factors of a site, and the exact gradient of a leaf that follows from them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax._precision import wide_dtype, widen
from dpoptax.per_example._devices import current_device
from dpoptax.per_example._primitives import LinearPrimitive, linear_primitive
from dpoptax.per_example._tracing.site import Site

HIGHEST = jax.lax.Precision.HIGHEST


class Factors(NamedTuple):
    """The inputs of a site and the cotangents of its output.

    Attributes:
        operands: arrays `(batch, *scans, *operand.shape)`, with one axis per scan around the site.
        cotangent: array `(batch, *scans, *output.shape)`.
    """

    operands: tuple[Array, ...]
    cotangent: Array


def narrow_dtype(
    factors: Sequence[Factors], spec: jax.ShapeDtypeStruct, *, integers: bool = False
) -> Any:
    """Returns the 16-bit type of all factors if they are multiplied in it, or None.

    A product of two 16-bit floats is exact in float32, in which it is summed. With `integers`,
    operands of whole numbers, such as indices, may come with them.
    """
    arrays = [leaf for factor in factors for leaf in (*factor.operands, factor.cotangent)]
    dtypes = {leaf.dtype for leaf in arrays}
    if integers:
        dtypes = {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
    # XLA on a CPU casts 16-bit floats to float32 before it multiplies them.
    if len(dtypes) != 1 or current_device().is_cpu or wide_dtype(spec.dtype) != jnp.float32:
        return None
    (dtype,) = dtypes
    return dtype if dtype in (jnp.bfloat16, jnp.float16) else None


def primitive_of(site: Site) -> LinearPrimitive:
    """What the table of primitives says about the equation of a site."""
    primitive = linear_primitive(site.primitive)
    assert primitive is not None, f"{site.primitive} is in no site, since it is not in the table"
    return primitive


def num_repeats(site: Site, spec: jax.ShapeDtypeStruct) -> int:
    """How often a number of the leaf is repeated on its way to the site, at most."""
    repeats, value = 1, spec
    for step in site.steps:
        if step.primitive is None:
            value = jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
            continue
        moved = jax.eval_shape(functools.partial(step.primitive.bind, **step.params), value)
        if step.primitive is jax.lax.broadcast_in_dim_p:
            repeats *= math.prod(moved.shape) // max(1, math.prod(value.shape))
        value = moved
    return max(1, repeats)


def num_terms(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> int:
    """How many terms an example adds to one number of its gradient at most."""
    return sum(
        site.num_runs * primitive_of(site).num_terms(site) * num_repeats(site, spec)
        for site in sites
    )


def leaf_gradient(
    sites: Sequence[Site], factors: Sequence[Factors], spec: jax.ShapeDtypeStruct
) -> Array:
    """Returns the gradient of a leaf, summed over the batch, in float32 or wider.

    It is the ordinary transpose of the equations, at the highest precision: one large product per
    site, whatever the size of the batch.
    """
    zeros = widen(jnp.zeros(spec.shape, spec.dtype))
    total = zeros
    for site, (operands, cotangent) in zip(sites, factors, strict=True):
        floats = as_floats(site, operands, zeros.dtype)
        batched = _batched(site, floats, cotangent.shape[0])
        output, pull = jax.vjp(batched, zeros)
        (gradient,) = pull(cotangent.astype(output.dtype))
        total = total + gradient
    return total


def to_leaf(site: Site, gradient: Array, spec: jax.ShapeDtypeStruct) -> Array:
    """Brings the gradient of a site's parameter back to the shape of the leaf.

    `gradient` has the shape of the parameter, after one axis per scan that slices the leaf.
    """
    zeros = jnp.zeros(spec.shape, gradient.dtype)
    _, pull = jax.vjp(lambda leaf: _follow(site, leaf), zeros)
    return pull(gradient)[0]


def _follow(site: Site, leaf: Array) -> Array:
    """The leaf as its site sees it, after one axis per scan that slices it."""
    value, num_slices = leaf, 0
    for step in site.steps:
        if step.primitive is None:
            # A scan slices here: later steps run once per slice.
            num_slices += 1
        elif step.primitive is not jax.lax.convert_element_type_p:  # all stays in float32
            move: Callable[[Array], Array] = functools.partial(step.primitive.bind, **step.params)
            for _ in range(num_slices):
                move = jax.vmap(move)
            value = move(value)
    return value


def _batched(site: Site, operands: tuple[Array, ...], batch: int) -> Callable[[Array], Array]:
    """The equation of a site as a function of the leaf alone, over the batch and all scans."""

    def run(leaf: Array) -> Array:
        mapped: Callable[..., Array] = functools.partial(primitive_of(site).bind_float32, site)
        for scan in reversed(site.scans):
            axes = (0 if scan.sliced else None, 0)
            mapped = jax.vmap(mapped, axes, axis_size=scan.length)
        return jax.vmap(mapped, (None, 0), axis_size=batch)(_follow(site, leaf), operands)

    return run


def as_floats(site: Site, operands: tuple[Array, ...], dtype: Any) -> tuple[Array, ...]:
    """The operands in the type of the gradient, except those that are indices.

    A product may take whole numbers, such as int8 inputs, and either float type.
    """
    indices = primitive_of(site).index_operands
    return tuple(
        operand if i in indices else operand.astype(dtype) for i, operand in enumerate(operands)
    )
