"""Splits a batch into chunks of examples, so that intermediate arrays stay small.

On a CPU a chunk fits into the cache. On an accelerator it only bounds the memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax.per_example._norm_rules import cost_model


def on_cpu() -> bool:
    """Whether the default backend, for which the program is compiled, is a CPU."""
    return jax.default_backend() == "cpu"


def chunk_size(num_floats: int) -> int:
    """Examples per chunk, if each needs `num_floats` floats: a power of two, at least one."""
    budget = cost_model.CPU_CHUNK_FLOATS if on_cpu() else cost_model.ACCELERATOR_CHUNK_FLOATS
    return 2 ** max(0, (budget // max(1, num_floats)).bit_length() - 1)


def map_chunks(function: Callable[[Any], Array], examples: Any, num_floats: int) -> Array:
    """Applies `function`, which treats examples independently, to one chunk after the other."""
    if _fits(examples, num_floats):
        return function(examples)
    results = jax.lax.map(function, _split(examples, chunk_size(num_floats)))
    return results.reshape(-1, *results.shape[2:])[: _batch_size(examples)]


def sum_chunks(function: Callable[[Any], Array], examples: Any, num_floats: int) -> Array:
    """Sums `function` over the chunks; it must be zero for examples that are all zeros."""
    if _fits(examples, num_floats):
        return function(examples)
    one = jax.tree.map(lambda leaf: leaf[:1], examples)
    zeros = jnp.zeros_like(jax.eval_shape(function, one))
    return fold_chunks(lambda total, chunk: total + function(chunk), zeros, examples, num_floats)


def fold_chunks(
    function: Callable[[Array, Any], Array], total: Array, examples: Any, num_floats: int
) -> Array:
    """Passes `total` through `function(total, chunk)`; all-zero examples must not change it."""
    if _fits(examples, num_floats):
        return function(total, examples)
    chunks = _split(examples, chunk_size(num_floats))
    return jax.lax.scan(lambda total, chunk: (function(total, chunk), None), total, chunks)[0]


def _batch_size(examples: Any) -> int:
    return jax.tree.leaves(examples)[0].shape[0]


def _fits(examples: Any, num_floats: int) -> bool:
    return chunk_size(num_floats) >= _batch_size(examples)


def _split(examples: Any, size: int) -> Any:
    """Reshapes `(batch, ...)` to `(chunks, size, ...)`, with zeros at the end of the last chunk."""

    def split(leaf: Array) -> Array:
        filled = jnp.pad(leaf, [(0, -leaf.shape[0] % size), *[(0, 0)] * (leaf.ndim - 1)])
        return filled.reshape(-1, size, *leaf.shape[1:])

    return jax.tree.map(split, examples)
