"""Brings the factors of a `dot_general` to the form of matrix products, and gradients back.

Per example, a use of the weight in a matrix product is H independent products A'G, with inputs A
of shape (T, K) and cotangents G of shape (T, N).
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import wide_dtype
from dpoptax.per_example._norm_rules.factors import Factors, narrow_dtype, to_leaf
from dpoptax.per_example._tracing.site import Site


class Sizes(NamedTuple):
    """H products of (T, K) by (T, N) per example."""

    h: int
    t: int
    k: int
    n: int


class Pair(NamedTuple):
    """Inputs `a`, (batch, H, T, K), and cotangents `g`, (batch, H, T, N)."""

    a: Float[Array, "batch h t k"]
    g: Float[Array, "batch h t n"]


def sizes_of(site: Site) -> Sizes:
    """The static sizes of one example's products."""
    contracting, batch = site.params["dimension_numbers"]
    own, other = site.position, 1 - site.position
    (operand,) = site.operands
    k = math.prod(site.parameter.shape[axis] for axis in contracting[own])
    h = math.prod(site.parameter.shape[axis] for axis in batch[own])
    n = math.prod(site.parameter.shape[axis] for axis in _free_axes(site))
    bound = (*contracting[other], *batch[other])
    t = math.prod(size for axis, size in enumerate(operand.shape) if axis not in bound)
    return Sizes(h * site.num_slices, t * site.num_uses, k, n)


def orientation(site: Site) -> Hashable:
    """Describes how K, N and H lie in the leaf: uses with equal descriptions may be joined along T.

    Changes of dtype and sharding are left out, because they move no number.
    """
    contracting, batch = site.params["dimension_numbers"]
    # A step without a primitive is a scan that slices the leaf; it has no parameters.
    steps = tuple(
        (step.primitive, repr({k: v for k, v in step.params.items() if k != "sharding"}))
        for step in site.steps
        if step.primitive is not jax.lax.convert_element_type_p
    )
    slices = tuple(scan for scan in site.scans if scan.sliced)
    return steps, slices, contracting[site.position], batch[site.position]


def as_pair(site: Site, factors: Factors, spec: jax.ShapeDtypeStruct, dtype: Any = None) -> Pair:
    """Brings the factors of a batch to `(batch, H, T, K)` and `(batch, H, T, N)`.

    They are cast to `dtype`, by default to float32 or wider.

    The axes before and after, where H' and T' are the parts of H and T inside one equation:

        operand     batch, scans..., then H', T' and K axes in any order
        cotangent   batch, scans..., H' axes, T' axes, N axes   if the weight is the right operand
                    batch, scans..., H' axes, N axes, T' axes   if it is the left operand

                    scans that slice the weight  +  H' axes  ->  H
                    scans that share the weight  +  T' axes  ->  T

        a           batch, H, T, K
        g           batch, H, T, N
    """
    contracting, batch = site.params["dimension_numbers"]
    own, other = site.position, 1 - site.position
    (operand,) = factors.operands
    lead = 1 + len(site.scans)  # the axes of the batch and of the scans
    # The K axes must come in the order of the weight, because `product_to_leaf` assumes it.
    order = sorted(range(len(contracting[own])), key=lambda i: contracting[own][i])
    k_axes = [contracting[other][i] + lead for i in order]
    operand_h_axes = [axis + lead for axis in batch[other]]
    operand_t_axes = [
        axis for axis in range(lead, operand.ndim) if axis not in (*k_axes, *operand_h_axes)
    ]
    # `dot_general` puts the batch axes first, then the free axes of its left operand, then those
    # of its right operand. The free axes of the weight are N, those of the other operand are T'.
    cotangent = factors.cotangent
    h_axes = list(range(lead, lead + len(operand_h_axes)))
    free = list(range(lead + len(operand_h_axes), cotangent.ndim))
    if own == 0:
        split = len(site.parameter.shape) - len(k_axes) - len(operand_h_axes)
        n_axes, t_axes = free[:split], free[split:]
    else:
        t_axes, n_axes = free[: len(operand_t_axes)], free[len(operand_t_axes) :]
    sliced = [1 + i for i, scan in enumerate(site.scans) if scan.sliced]
    shared = [1 + i for i, scan in enumerate(site.scans) if not scan.sliced]
    h, t, k, n = sizes_of(site)
    size = operand.shape[0]
    a_order = (0, *sliced, *operand_h_axes, *shared, *operand_t_axes, *k_axes)
    g_order = (0, *sliced, *h_axes, *shared, *t_axes, *n_axes)
    # The operand may be of whole numbers, and either may be of another float type than the leaf.
    dtype = dtype or wide_dtype(spec.dtype)
    a = operand.astype(dtype).transpose(a_order).reshape(size, h, t, k)
    g = cotangent.astype(dtype).transpose(g_order).reshape(size, h, t, n)
    return Pair(a, g)


def join_pairs(
    sites: Sequence[Site], factors: Sequence[Factors], spec: jax.ShapeDtypeStruct
) -> Pair:
    """Joins all uses of a weight, in one orientation, along T; in 16 bits if all factors are."""
    dtype = narrow_dtype(factors, spec)
    pairs = [
        as_pair(site, factor, spec, dtype) for site, factor in zip(sites, factors, strict=True)
    ]
    if len(pairs) == 1:
        return pairs[0]
    return Pair(*(jnp.concatenate(leaves, axis=2) for leaves in zip(*pairs, strict=True)))


def product_to_leaf(
    site: Site, product: Float[Array, "h k n"], spec: jax.ShapeDtypeStruct
) -> Array:
    """Brings the product of one pair to the axes of the weight, and from there to the leaf."""
    contracting, batch = site.params["dimension_numbers"]
    shape = site.parameter.shape
    sliced = [scan.length for scan in site.scans if scan.sliced]
    # The axes of the weight in the order in which H, K and N list them.
    order = [*batch[site.position], *sorted(contracting[site.position]), *_free_axes(site)]
    product = product.reshape(*sliced, *(shape[axis] for axis in order))
    inverse = sorted(range(len(order)), key=lambda position: order[position])
    lead = range(len(sliced))
    return to_leaf(site, product.transpose(*lead, *(len(sliced) + i for i in inverse)), spec)


def _free_axes(site: Site) -> list[int]:
    """The axes of the weight that are neither contracted nor batched: N."""
    contracting, batch = site.params["dimension_numbers"]
    bound = (*contracting[site.position], *batch[site.position])
    return [axis for axis in range(len(site.parameter.shape)) if axis not in bound]
