"""The gradient of each example is formed, a few examples at a time, squared and dropped.

It understands every site, and any number of them on one leaf.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import widen
from dpoptax.per_example._base import select
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks
from dpoptax.per_example._norm_rules.factors import Factors, leaf_gradient
from dpoptax.per_example._norm_rules.rounding import rounded_up, sum_of_squares
from dpoptax.per_example._primitives import LinearPrimitive, linear_primitive
from dpoptax.per_example._tracing.site import Site

# A gradient formed example by example is far from the speed of one large product.
OVERHEAD = 8.0


def candidates(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> Iterator[NormRule]:
    """Yields the one rule of this file."""
    size = math.prod(spec.shape)
    yield NormRule(
        "direct",
        functools.partial(squared_norms, sites, spec),
        functools.partial(gradients, sites, spec),
        functools.partial(total, sites, spec),
        OVERHEAD * operations(sites, spec),
        size,
    )


def operations(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> float:
    """How many multiplications form the gradient of one example."""
    size = math.prod(spec.shape)
    return sum(size * _linear(site).multiplications(site) for site in sites)


def squared_norms(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct, factors: Sequence[Factors]
) -> Float[Array, " batch"]:
    """Squares and drops the gradient of every example."""

    def norms(chunk: Sequence[Factors]) -> Array:
        formed = jnp.square(_form(sites, spec, chunk))
        sizes = jnp.stack([_size(factors) for factors in chunk]).sum(axis=0)
        terms = sum(site.num_runs * _linear(site).num_terms(site) for site in sites)
        return rounded_up(jnp.sum(formed, axis=tuple(range(1, formed.ndim))), sizes, terms)

    return map_chunks(norms, list(factors), math.prod(spec.shape))


def gradients(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct, factors: Sequence[Factors]
) -> Float[Array, "batch ..."]:
    """Forms the gradient of every example, in float32 or wider."""
    numbers = math.prod(spec.shape) + sum(site.num_floats for site in sites)
    return map_chunks(functools.partial(_form, sites, spec), list(factors), numbers)


def total(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct, factors: Sequence[Factors]
) -> Float[Array, "..."]:
    """Adds up the gradients by the ordinary transpose of the equations."""
    return leaf_gradient(sites, factors, spec)


def _form(sites: Sequence[Site], spec: jax.ShapeDtypeStruct, factors: Sequence[Factors]) -> Array:
    def one(example: Sequence[Factors]) -> Array:
        return leaf_gradient(sites, jax.tree.map(lambda leaf: leaf[None], example), spec)

    factors = list(factors)
    if not any(_linear(site).spreads_nan for site in sites):
        return jax.vmap(one)(factors)
    # Under vmap XLA spreads NaN from one example's kernel gradient to those of others.
    finite = functools.reduce(jnp.logical_and, map(_finite, jax.tree.leaves(factors)))
    clean = jax.tree.map(lambda leaf: select(finite, leaf), factors)
    return select(finite, jax.vmap(one)(clean), jnp.nan)


def _size(factors: Factors) -> Float[Array, " batch"]:
    """At least the sum of the squared norms of the terms of the gradient."""
    size = _squares(factors.cotangent)
    for operand in factors.operands:
        if jnp.issubdtype(operand.dtype, jnp.floating):
            size = size * _squares(operand)
    return size


def _squares(leaf: Array) -> Float[Array, " batch"]:
    return sum_of_squares(widen(leaf), tuple(range(1, leaf.ndim)))


def _finite(leaf: Array) -> Array:
    return jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))


def _linear(site: Site) -> LinearPrimitive:
    linear = linear_primitive(site.primitive)
    assert linear is not None
    return linear
