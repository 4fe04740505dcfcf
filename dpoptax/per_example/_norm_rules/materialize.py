"""Materialized gradients: each is computed, squared and dropped, a few examples at a time.

This rule applies to every kind of site, and to any number of them on one leaf. It is also the
reference for the other rules in the tests.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax.per_example._base import select
from dpoptax.per_example._norm_rules import cost_model
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks
from dpoptax.per_example._norm_rules.factors import (
    Factors,
    leaf_gradient,
    primitive_of,
)
from dpoptax.per_example._norm_rules.rounding import round_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


@dataclasses.dataclass(frozen=True, eq=False)
class Materialize(NormRule):
    """Computes the gradient of every example by the ordinary transpose of its equations."""

    name = "direct"

    @classmethod
    def matches(cls, sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> "Materialize":
        """Accepts every leaf."""
        return cls(tuple(sites), spec)

    @property
    def cost(self) -> float:
        """See `NormRule.cost`."""
        costs = cost_model.constants(self.sites)
        products = materialization_cost(self.sites, self.spec)
        return costs.materialize * products + costs.materialized * math.prod(self.spec.shape)

    def squared_norms(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        """See `NormRule.squared_norms`."""

        def norms(chunk: Sequence[Factors]) -> Array:
            squares = jnp.square(_materialize_chunk(self.sites, chunk, self.spec))
            sizes = jnp.stack(
                [
                    _size_of_terms(site, factor, squares.dtype)
                    for site, factor in zip(self.sites, chunk, strict=True)
                ]
            ).sum(axis=0)
            sums = jnp.sum(squares, axis=tuple(range(1, squares.ndim)))
            return round_up(sums, sizes, self.num_terms)

        return map_chunks(norms, list(factors), math.prod(self.spec.shape))

    @property
    def num_floats(self) -> int:
        """See `NormRule.num_floats`."""
        # Under `vmap` the gradient of a kernel is slow, so examples are worked on one by one.
        slow = any(primitive_of(site).spreads_nan for site in self.sites)
        return sys.maxsize if slow else super().num_floats

    def gradients(self, factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
        """See `NormRule.gradients`."""
        return materialize(self.sites, factors, self.spec)

    def weighted_sum(self, factors: Sequence[Factors]) -> Float[Array, "..."]:
        """See `NormRule.weighted_sum`."""
        return leaf_gradient(self.sites, factors, self.spec)


def materialization_cost(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> float:
    """How many multiplications compute the gradient of one example."""
    size = math.prod(spec.shape)
    return sum(size * site.num_uses * primitive_of(site).multiplications(site) for site in sites)


def materialize(
    sites: Sequence[Site], factors: Sequence[Factors], spec: jax.ShapeDtypeStruct
) -> Float[Array, "batch ..."]:
    """Returns the gradient of every example, for sites of any kind."""
    num_floats = math.prod(spec.shape) + sum(site.num_floats for site in sites)
    return map_chunks(
        lambda chunk: _materialize_chunk(sites, chunk, spec), list(factors), num_floats
    )


def _materialize_chunk(
    sites: Sequence[Site], factors: Sequence[Factors], spec: jax.ShapeDtypeStruct
) -> Array:
    def one(example: Sequence[Factors]) -> Array:
        return leaf_gradient(sites, jax.tree.map(lambda leaf: leaf[None], example), spec)

    factors = list(factors)
    if not any(primitive_of(site).spreads_nan for site in sites):
        return jax.vmap(one)(factors)
    # Under vmap, NaN in one example would reach the others: compute such examples from zeros, and
    # put NaN into their own gradients afterwards.
    finite = functools.reduce(jnp.logical_and, map(_finite, jax.tree.leaves(factors)))
    clean = jax.tree.map(lambda leaf: select(finite, leaf), factors)
    return select(finite, jax.vmap(one)(clean), jnp.nan)


def _size_of_terms(site: Site, factors: Factors, dtype: Any) -> Float[Array, " batch"]:
    """At least the sum of the squared norms of the terms of each gradient.

    A term is a number of the cotangent times one of the operand, and each such pair is in at most
    one term, so the product of the squared norms is an upper bound.
    """
    size = _squared_norm(factors.cotangent.astype(dtype))
    indices = primitive_of(site).index_operands
    for i, operand in enumerate(factors.operands):
        if i not in indices:
            size = size * _squared_norm(operand.astype(dtype))
    return size


def _squared_norm(leaf: Array) -> Float[Array, " batch"]:
    return sum_of_squares(leaf, tuple(range(1, leaf.ndim)))


def _finite(leaf: Array) -> Array:
    return jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
