"""Matrix products: the gradient of an example is A'G, with A (T, K) inputs and G (T, N) cotangents.

    T = 1:   ||A'G||^2 = ||a||^2 ||g||^2                  (Goodfellow 2015, arXiv:1510.01799)
    direct:  ||A'G||^2 by forming A'G                     K N T multiplications
    Gram:    ||A'G||^2 = <A A', G G'>                     (K + N) T^2 multiplications
                                                          (Li et al. 2022, arXiv:2110.05679)

Batch dimensions of the weight, and scans that slice it, are H independent products, and their
norms add. Scans that share the weight, and further uses of it, join T.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import widen
from dpoptax.per_example._norm_rules import gram
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks
from dpoptax.per_example._norm_rules.factors import HIGHEST, Factors, to_leaf
from dpoptax.per_example._norm_rules.rounding import rounded_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


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


def candidates(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> Iterator[NormRule]:
    """Yields the ways for a leaf whose every use is the same product."""
    if any(s.primitive.name != "dot_general" or not s.preserves_norms(spec) for s in sites):
        return
    if len({orientation(site) for site in sites}) > 1:
        return
    h, _, k, n = sizes(sites[0])
    t = sum(sizes(site).t for site in sites)

    def rule(
        name: str, norms: Callable[[Pair], Array], operations: float, memory: float
    ) -> NormRule:
        return NormRule(
            name,
            lambda factors: norms(_joined(sites, factors)),
            functools.partial(gradients, sites, spec),
            functools.partial(total, sites, spec),
            operations,
            memory,
        )

    if t == 1:
        yield rule("outer", _outer, h * (k + n), 2 * h)
    else:
        yield rule("direct", _direct, h * t * k * n + 2 * h * k * n, h * k * n)
        yield rule("Gram", _gram, h * t * t * (k + n) + 2 * h * t * t, 2 * h * t * t)


def gradients(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct, factors: Sequence[Factors]
) -> Float[Array, "batch ..."]:
    """Forms the gradient of every example, in float32 or wider."""
    pair = _joined(sites, factors)
    return jax.vmap(lambda product: _to_leaf(sites[0], product, spec))(_products(pair))


def total(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct, factors: Sequence[Factors]
) -> Float[Array, "..."]:
    """Adds up the gradients, one product over the whole batch per site."""
    products = []
    for site, factor in zip(sites, factors, strict=True):
        a, g = (leaf.swapaxes(0, 1) for leaf in as_pair(site, factor))
        joined = Pair(*(leaf.reshape(1, len(leaf), -1, leaf.shape[-1]) for leaf in (a, g)))
        products.append(_products(joined)[0])
    return _to_leaf(sites[0], sum(products[1:], products[0]), spec)


def sizes(site: Site) -> Sizes:
    """The static sizes of one example's product."""
    contracting, batch = site.params["dimension_numbers"]
    own = site.position
    (operand,) = site.operands
    k = math.prod(site.parameter.shape[i] for i in contracting[own])
    h = math.prod(site.parameter.shape[i] for i in batch[own])
    free = [
        n for i, n in enumerate(site.parameter.shape) if i not in (*contracting[own], *batch[own])
    ]
    n = math.prod(free)
    other = (*contracting[1 - own], *batch[1 - own])
    t = math.prod(n for i, n in enumerate(operand.shape) if i not in other)
    sliced = math.prod(scan.length for scan in site.scans if scan.sliced)
    shared = math.prod(scan.length for scan in site.scans if not scan.sliced)
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
    levels = [scan for scan in site.scans if scan.sliced]
    return repr((steps, levels, contracting[site.position], batch[site.position]))


def as_pair(site: Site, factors: Factors) -> Pair:
    """Brings the factors of a batch to `(batch, H, T, K)` and `(batch, H, T, N)`."""
    contracting, batch = site.params["dimension_numbers"]
    own, other = site.position, 1 - site.position
    (operand,) = factors.operands
    lead = 1 + len(site.scans)
    # In the operand: batch, free and contracted axes, the last two in the order of the weight.
    order = sorted(range(len(contracting[own])), key=lambda i: contracting[own][i])
    contracted = [contracting[other][i] + lead for i in order]
    batched = [axis + lead for axis in batch[other]]
    free = [
        axis for axis in range(lead, operand.ndim) if axis not in contracted and axis not in batched
    ]
    # In the cotangent: batch axes, then the free axes of the left and of the right operand.
    num_batched = len(batched)
    num_own = len(site.parameter.shape) - len(contracted) - num_batched
    cotangent = factors.cotangent
    after = list(range(lead + num_batched, cotangent.ndim))
    if own == 0:
        own_free, other_free = after[:num_own], after[num_own:]
    else:
        other_free, own_free = after[: len(free)], after[len(free) :]
    sliced = [1 + i for i, scan in enumerate(site.scans) if scan.sliced]
    shared = [1 + i for i, scan in enumerate(site.scans) if not scan.sliced]
    in_cotangent = list(range(lead, lead + num_batched))
    h, t, k, n = sizes(site)
    size = operand.shape[0]
    a = widen(operand).transpose(0, *sliced, *batched, *shared, *free, *contracted)
    g = widen(cotangent).transpose(0, *sliced, *in_cotangent, *shared, *other_free, *own_free)
    return Pair(a.reshape(size, h, t, k), g.reshape(size, h, t, n))


def _joined(sites: Sequence[Site], factors: Sequence[Factors]) -> Pair:
    pairs = [as_pair(site, factor) for site, factor in zip(sites, factors, strict=True)]
    if len(pairs) == 1:
        return pairs[0]
    return Pair(*(jnp.concatenate(part, axis=2) for part in zip(*pairs, strict=True)))


def _to_leaf(site: Site, product: Float[Array, "h k n"], spec: jax.ShapeDtypeStruct) -> Array:
    """Undoes `as_pair` for the product of one pair."""
    contracting, batch = site.params["dimension_numbers"]
    shape = site.parameter.shape
    sliced = [scan.length for scan in site.scans if scan.sliced]
    contracted = sorted(contracting[site.position])
    batched = list(batch[site.position])
    free = [axis for axis in range(len(shape)) if axis not in (*contracted, *batched)]
    order = [*batched, *contracted, *free]
    product = product.reshape(*sliced, *(shape[axis] for axis in order))
    inverse = sorted(range(len(order)), key=lambda position: order[position])
    lead = range(len(sliced))
    return to_leaf(site, product.transpose(*lead, *(len(sliced) + i for i in inverse)), spec)


def _products(pair: Pair) -> Float[Array, "batch h k n"]:
    a, g = (leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]) for leaf in pair)
    # A product is fastest with its longer side last.
    if a.shape[-1] <= g.shape[-1]:
        products = jnp.einsum("btk,btn->bkn", a, g, precision=HIGHEST)
    else:
        products = jnp.einsum("btk,btn->bnk", a, g, precision=HIGHEST).swapaxes(1, 2)
    return products.reshape(*pair.a.shape[:2], *products.shape[1:])


def _outer(pair: Pair) -> Float[Array, " batch"]:
    batch, h = pair.a.shape[:2]

    def squares(leaf: Array) -> Array:
        return sum_of_squares(leaf.reshape(batch * h, leaf.shape[2] * leaf.shape[3]), (1,))

    return jnp.sum((squares(pair.a) * squares(pair.g)).reshape(batch, h), axis=1)


def _direct(pair: Pair) -> Float[Array, " batch"]:
    _, h, t, k = pair.a.shape
    n = pair.g.shape[3]

    def norms(pair: Pair) -> Array:
        terms = sum_of_squares(pair.a, (3,)) * sum_of_squares(pair.g, (3,))
        products = jnp.sum(jnp.square(_products(pair)), axis=(1, 2, 3))
        return rounded_up(products, jnp.sum(terms, axis=(1, 2)), t)

    return map_chunks(norms, pair, h * (k * n + t * (k + n)))


def _gram(pair: Pair) -> Float[Array, " batch"]:
    _, h, t, k = pair.a.shape

    def norms(pair: Pair) -> Array:
        inputs = jnp.einsum("bhtk,bhsk->bhts", pair.a, pair.a, precision=HIGHEST)
        cotangents = jnp.einsum("bhtn,bhsn->bhts", pair.g, pair.g, precision=HIGHEST)
        return jnp.sum(gram.squared_norms(inputs, cotangents), axis=1)

    return map_chunks(norms, pair, h * t * (2 * t + k + pair.g.shape[3]))
