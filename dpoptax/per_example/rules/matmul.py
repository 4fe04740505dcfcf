"""Matrix products: the gradient of an example is A'G, with A (T, K) inputs and G (T, N) cotangents.

    T = 1:   ||A'G||^2 = ||a||^2 ||g||^2                  (Goodfellow 2015, arXiv:1510.01799)
    direct:  ||A'G||^2 by forming A'G                     K N T multiplications
    Gram:    ||A'G||^2 = <A A', G G'>                     (K + N) T^2 multiplications
                                                          (Li et al. 2022, arXiv:2110.05679)

Batch dimensions of the weight, and scans that slice it, are H independent products, and their
norms add. Scans that share the weight, and further uses of it, join T.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax.per_example.rules.direct import in_chunks
from dpoptax.per_example.rules.factors import Factors
from dpoptax.per_example.tracing import Site
from dpoptax.precision import widen

HIGHEST = jax.lax.Precision.HIGHEST


class Sizes(NamedTuple):
    """H products of (T, K) by (T, N) per example."""

    h: int
    t: int
    k: int
    n: int


class Pair(NamedTuple):
    """Inputs (batch, H, T, K) and cotangents (batch, H, T, N)."""

    a: Float[Array, "batch h t k"]
    g: Float[Array, "batch h t n"]


def candidates(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct
) -> Iterator[tuple[str, Callable[[Sequence[Factors]], Array], float, float]]:
    """Yields the three ways for a leaf whose every use is the same product."""
    if any(s.primitive.name != "dot_general" or not s.isometric(spec) for s in sites):
        return
    if len({orientation(site) for site in sites}) > 1:
        return
    h, _, k, n = sizes(sites[0])
    t = sum(sizes(site).t for site in sites)

    def with_pair(rule: Callable[[Pair], Array]) -> Callable[[Sequence[Factors]], Array]:
        def squared_norms(factors: Sequence[Factors]) -> Array:
            pairs = [as_pair(site, factor) for site, factor in zip(sites, factors, strict=True)]
            return rule(Pair(*(jnp.concatenate(part, axis=2) for part in zip(*pairs, strict=True))))

        return squared_norms

    if t == 1:
        yield "outer", with_pair(_outer), h * (k + n), 2 * h
    else:
        yield "direct", with_pair(_direct), h * t * k * n + 2 * h * k * n, h * k * n
        yield "Gram", with_pair(_gram), h * t * t * (k + n) + 2 * h * t * t, 2 * h * t * t


def sizes(site: Site) -> Sizes:
    """The static sizes of one example's product."""
    contracting, batch = site.params["dimension_numbers"]
    own, other = site.position, 1 - site.position
    (operand,) = site.operands
    k = math.prod(site.weight.shape[i] for i in contracting[own])
    h = math.prod(site.weight.shape[i] for i in batch[own])
    n = math.prod(site.weight.shape) // (k * h) if k * h else 0
    t = math.prod(operand.shape) // (k * h) if k * h else 0
    del other
    sliced = math.prod(level.length for level in site.levels if level.sliced)
    shared = math.prod(level.length for level in site.levels if not level.sliced)
    return Sizes(h * sliced, t * shared, k, n)


def orientation(site: Site) -> str:
    """How the product lies in the leaf: uses of one orientation may join along T."""
    contracting, batch = site.params["dimension_numbers"]
    steps = [
        (step.primitive.name, {k: v for k, v in step.params.items() if k != "sharding"})
        if step.primitive is not None
        else "slice"
        for step in site.steps
        if step.primitive is None or step.primitive.name != "convert_element_type"
    ]
    levels = [level for level in site.levels if level.sliced]
    return repr((steps, levels, contracting[site.position], batch[site.position]))


def as_pair(site: Site, factors: Factors) -> Pair:
    """Brings the factors of a batch to `(batch, H, T, K)` and `(batch, H, T, N)`."""
    contracting, batch = site.params["dimension_numbers"]
    own, other = site.position, 1 - site.position
    (operand,) = factors.operands
    lead = 1 + len(site.levels)
    # In the operand: batch, free and contracted axes, the last two in the order of the weight.
    order = sorted(range(len(contracting[own])), key=lambda i: contracting[own][i])
    contracted = [contracting[other][i] + lead for i in order]
    batched = [axis + lead for axis in batch[other]]
    free = [
        axis for axis in range(lead, operand.ndim) if axis not in contracted and axis not in batched
    ]
    # In the cotangent: batch axes, then the free axes of the left and of the right operand.
    num_batched = len(batched)
    num_own = len(site.weight.shape) - len(contracted) - num_batched
    cotangent = factors.cotangent
    after = list(range(lead + num_batched, cotangent.ndim))
    if own == 0:
        own_free, other_free = after[:num_own], after[num_own:]
    else:
        other_free, own_free = after[: len(free)], after[len(free) :]
    sliced = [1 + i for i, level in enumerate(site.levels) if level.sliced]
    shared = [1 + i for i, level in enumerate(site.levels) if not level.sliced]
    in_cotangent = list(range(lead, lead + num_batched))
    h, t, k, n = sizes(site)
    size = operand.shape[0]
    a = widen(operand).transpose(0, *sliced, *batched, *shared, *free, *contracted)
    g = widen(cotangent).transpose(0, *sliced, *in_cotangent, *shared, *other_free, *own_free)
    return Pair(a.reshape(size, h, t, k), g.reshape(size, h, t, n))


def _outer(pair: Pair) -> Float[Array, " batch"]:
    def squares(leaf: Array) -> Array:
        return jnp.sum(jnp.square(leaf), axis=(2, 3))

    return jnp.sum(squares(pair.a) * squares(pair.g), axis=1)


def _direct(pair: Pair) -> Float[Array, " batch"]:
    def one(pair: Pair) -> Array:
        product = jnp.einsum("htk,htn->hkn", pair.a, pair.g, precision=HIGHEST)
        return jnp.sum(jnp.square(product))

    _, h, t, k = pair.a.shape
    n = pair.g.shape[3]
    return in_chunks(one, pair, h * (k * n + t * (k + n)))


def _gram(pair: Pair) -> Float[Array, " batch"]:
    def one(pair: Pair) -> Array:
        inputs = jnp.einsum("htk,hsk->hts", pair.a, pair.a, precision=HIGHEST)
        cotangents = jnp.einsum("htn,hsn->hts", pair.g, pair.g, precision=HIGHEST)
        # Rounding may push a small sum below zero; a squared norm is none.
        return jnp.maximum(jnp.sum(inputs * cotangents), 0.0)

    _, h, t, k = pair.a.shape
    return in_chunks(one, pair, h * t * (2 * t + k + pair.g.shape[3]))
