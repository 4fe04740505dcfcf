"""The gradient of each example is formed, a few examples at a time, squared and dropped.

It understands every site, and any number of them on one leaf.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax.per_example.rules.factors import Factors, leaf_gradient
from dpoptax.per_example.tracing import Site

# Numbers that a chunk may hold: on a CPU about what stays in the cache.
CHUNK = 2**20
ACCELERATOR_CHUNK = 2**26
# A gradient formed example by example is far from the speed of one large product.
OVERHEAD = 8.0


def gradients(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct, factors: Sequence[Factors]
) -> Float[Array, "batch ..."]:
    """Forms the gradient of every example, in float32 or wider."""

    def one(example: Sequence[Factors]) -> Array:
        return leaf_gradient(sites, jax.tree.map(lambda leaf: leaf[None], example), spec)

    numbers = math.prod(spec.shape) + sum(site.numbers for site in sites)
    return in_chunks(one, list(factors), numbers)


def in_chunks(function: Callable[..., Array], examples: Any, numbers: int) -> Array:
    """Maps `function` over examples that need `numbers` numbers each, a cache-full at a time."""
    batch = jax.tree.leaves(examples)[0].shape[0]
    chunk = chunk_size(numbers)
    if chunk >= batch:
        return jax.vmap(function)(examples)
    return jax.lax.map(function, examples, batch_size=chunk)


def candidates(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct
) -> Iterator[tuple[str, Callable[[Sequence[Factors]], Array], float, float]]:
    """Yields the one rule of this file."""
    size = math.prod(spec.shape)

    def squared_norms(factors: Sequence[Factors]) -> Float[Array, " batch"]:
        def one(example: Sequence[Factors]) -> Array:
            gradient = leaf_gradient(sites, jax.tree.map(lambda leaf: leaf[None], example), spec)
            return jnp.sum(jnp.square(gradient))

        return in_chunks(one, list(factors), size)

    operations = sum(
        size * math.prod(site.output.shape) / max(1, _contracted(site)) for site in sites
    )
    yield "direct", squared_norms, OVERHEAD * operations, size


def chunk_size(numbers: int) -> int:
    """How many examples to work on at once, if each needs `numbers` numbers."""
    budget = CHUNK if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK
    return max(1, budget // max(1, numbers))


def _contracted(site: Site) -> int:
    """Output numbers that one weight does not touch, for the count of multiplications."""
    if site.primitive.name == "dot_general":
        contracting, batch = site.params["dimension_numbers"]
        own, axes = contracting[site.position], batch[site.position]
        free = [n for i, n in enumerate(site.weight.shape) if i not in (*own, *axes)]
        batched = [site.weight.shape[i] for i in axes]
        return math.prod(free) * math.prod(batched)
    if site.primitive.name == "conv_general_dilated":
        return site.weight.shape[site.params["dimension_numbers"].rhs_spec[0]]
    return math.prod(site.weight.shape)
