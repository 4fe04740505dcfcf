"""A batch is worked through a few examples at a time: on a CPU, as many as stay in the cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

# Numbers that a chunk may hold.
CPU_CHUNK = 2**22
ACCELERATOR_CHUNK = 2**26


def on_cpu() -> bool:
    """Whether the program is compiled for a CPU."""
    return jax.default_backend() == "cpu"


def chunk_size(numbers: int) -> int:
    """How many examples to work on at once if each needs `numbers` numbers: a power of two."""
    budget = CPU_CHUNK if on_cpu() else ACCELERATOR_CHUNK
    return 2 ** max(0, (budget // max(1, numbers)).bit_length() - 1)


def map_chunks(function: Callable[[Any], Array], examples: Any, numbers: int) -> Array:
    """Applies a function of a batch, row by row independent, to one chunk after the other.

    Args:
        function: from a tree of arrays `(rows, ...)` to an array `(rows, ...)`.
        examples: a tree of arrays `(batch, ...)`.
        numbers: what each example needs.

    Returns:
        An array `(batch, ...)`.
    """
    if _fits(examples, numbers):
        return function(examples)
    results = jax.lax.map(function, _split(examples, chunk_size(numbers)))
    return results.reshape(-1, *results.shape[2:])[: _batch(examples)]


def sum_chunks(function: Callable[[Any], Array], examples: Any, numbers: int) -> Array:
    """Adds up a function of a batch, zero on rows of zeros, over one chunk after the other.

    Args:
        function: from a tree of arrays `(rows, ...)` to an array.
        examples: a tree of arrays `(batch, ...)`.
        numbers: what each example needs.

    Returns:
        The sum.
    """
    if _fits(examples, numbers):
        return function(examples)
    one = jax.tree.map(lambda leaf: leaf[:1], examples)
    zeros = jnp.zeros_like(jax.eval_shape(function, one))
    return fold_chunks(lambda total, part: total + function(part), zeros, examples, numbers)


def fold_chunks(
    function: Callable[[Array, Any], Array], total: Array, examples: Any, numbers: int
) -> Array:
    """Adds to a total what a function adds to it, zero on rows of zeros, chunk by chunk.

    Args:
        function: from a total and a tree of arrays `(rows, ...)` to the next total.
        total: the first.
        examples: a tree of arrays `(batch, ...)`.
        numbers: what each example needs.

    Returns:
        The last total.
    """
    if _fits(examples, numbers):
        return function(total, examples)
    chunks = _split(examples, chunk_size(numbers))
    return jax.lax.scan(lambda total, part: (function(total, part), None), total, chunks)[0]


def _batch(examples: Any) -> int:
    return jax.tree.leaves(examples)[0].shape[0]


def _fits(examples: Any, numbers: int) -> bool:
    return chunk_size(numbers) >= _batch(examples)


def _split(examples: Any, chunk: int) -> Any:
    """Fills the last chunk up with rows of zeros."""

    def split(leaf: Array) -> Array:
        filled = jnp.pad(leaf, [(0, -leaf.shape[0] % chunk), *[(0, 0)] * (leaf.ndim - 1)])
        return filled.reshape(-1, chunk, *leaf.shape[1:])

    return jax.tree.map(split, examples)
