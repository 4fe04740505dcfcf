"""Splits a batch into chunks of examples, so that intermediate arrays stay small.

On a CPU a chunk fits into the cache. On an accelerator it only bounds the memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax.per_example._batch_sum import (
    balanced,
    examples_per_chunk,
    num_lanes,
    sum_in_chunks,
)
from dpoptax.per_example._devices import current_device
from dpoptax.per_example._norm_rules import cost_model
from dpoptax.per_example._packed import pack, unpack


def on_cpu() -> bool:
    """Whether the program is traced for a CPU."""
    return current_device().is_cpu


def chunk_size(num_floats: int) -> int:
    """Examples per chunk, if each needs `num_floats` floats: a power of two, at least one."""
    budget = cost_model.constants().chunk_floats
    return 2 ** max(0, (budget // max(1, num_floats)).bit_length() - 1)


def map_chunks(function: Callable[[Any], Any], examples: Any, num_floats: int) -> Any:
    """Applies `function`, which treats examples independently, to one chunk after the other."""
    batch, size = _batch_size(examples), chunk_size(num_floats)
    lanes = num_lanes(batch)
    # Each device works on chunks of its own rows.
    if batch <= lanes * size:
        return function(examples)
    # A default batch is a little larger than a power of two, and would fill half of its last chunk.
    size = balanced(batch // lanes, size)
    results = jax.lax.map(
        lambda chunk: function(unpack(chunk, examples)), _split(pack(examples), lanes, size)
    )
    return jax.tree.map(lambda leaf: _join(leaf, lanes, batch), results)


def sum_examples(
    function: Callable[[Any], Array],
    examples: Any,
    num_terms: int,
    num_floats: int,
    *,
    side_by_side: bool = False,
) -> Array:
    """Sums `function`, a sum over a few examples, over the batch; zero for all-zero examples.

    Args:
        function: from a part of the batch to the sum of its gradients.
        examples: arrays with a leading axis of examples.
        num_terms: how many terms one example adds to a number of the sum.
        num_floats: how many floats `function` needs per example.
        side_by_side: whether a few chunks are faster by `vmap` than one after the other.
    """
    size = examples_per_chunk(num_terms)
    at_once = chunk_size(size * num_floats)
    # On a CPU, two large products side by side are slower than one after the other. Measured for
    # the sums of a decoder of width 512 with 256 tokens: 1.2x slower.
    if at_once == 2 and on_cpu():
        at_once = 1
    return sum_in_chunks(function, examples, size, at_once, side_by_side=side_by_side)


def _batch_size(examples: Any) -> int:
    return jax.tree.leaves(examples)[0].shape[0]


def _split(examples: Any, lanes: int, size: int) -> Any:
    """Reshapes `(batch, ...)` to `(chunks, lanes * size, ...)`, with zeros in the last chunk."""

    def split(leaf: Array) -> Array:
        by_lane = leaf.reshape(lanes, leaf.shape[0] // lanes, *leaf.shape[1:])
        padding = (0, -by_lane.shape[1] % size)
        filled = jnp.pad(by_lane, [(0, 0), padding, *[(0, 0)] * (leaf.ndim - 1)])
        chunks = filled.reshape(lanes, filled.shape[1] // size, size, *leaf.shape[1:])
        by_chunk = jnp.moveaxis(chunks, 1, 0)
        return by_chunk.reshape(len(by_chunk), lanes * size, *leaf.shape[1:])

    return jax.tree.map(split, examples)


def _join(leaf: Array, lanes: int, batch: int) -> Array:
    """Reverses `_split`, for an array `(chunks, lanes * size, ...)`."""
    chunks, rows, *rest = leaf.shape
    by_chunk = leaf.reshape(chunks, lanes, rows // lanes, *rest)
    by_lane = jnp.moveaxis(by_chunk, 1, 0).reshape(lanes, chunks * rows // lanes, *rest)
    return by_lane[:, : batch // lanes].reshape(batch, *rest)
