"""Sums over the batch whose rounding errors do not grow with the batch.

A plain float32 sum over a large batch can let one example move the result by more than its clipped
gradient: where a partial sum is large, or passes a power of two, the terms that follow are rounded
in another way. So a few examples are added in float32 at a time, and their totals are added in
double-word arithmetic: as an unevaluated sum of two floats, with about 48 bits. `docs/numerics.md`
states what this proves, and how the constants below enter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

# How many examples are added in float32 at a time, if each adds one term per number: with a batch
# of this size the rounding errors are at most 1/64 of the clip bound. Larger chunks are faster, and
# the bound grows with their square.
CHUNK = 256

# So many chunk totals are added in plain float32 before the result joins the double-word total.
# This adds at most 1/256 of the clip bound.
RUN = 8

# A leaf whose terms cancel within an example has a large norm by definition once its terms are
# this many times as large as the gradient: see `rounding.py`.
MAX_CANCELLATION = 256.0


def examples_per_chunk(num_terms: int) -> int:
    """How many examples may be added at a time, if each adds `num_terms` terms per number.

    The bound on the error of a chunk is 4 u m^2 T^(3/2) MAX_CANCELLATION clip bounds, for m
    examples of T terms: this is the largest power of two that keeps it below 1/64. One example at a
    time has no such error, because its gradient depends on no other example.
    """
    if num_terms <= 1:
        return CHUNK
    size = CHUNK
    while size > 1 and size**2 * num_terms**1.5 * MAX_CANCELLATION > CHUNK**2:
        size //= 2
    return size


def sum_in_chunks(
    function: Callable[[Any], Array], examples: Any, size: int, at_once: int
) -> Array:
    """Sums `function`, a float32 sum over a few examples, over chunks of `size` examples.

    `function` must be zero for examples that are all zeros, as padding is. Up to `at_once` chunks
    are worked on together, by `vmap`.
    """
    batch = jax.tree.leaves(examples)[0].shape[0]
    if batch <= size:
        return function(examples)
    lanes = _num_lanes(batch)
    at_once = max(1, min(at_once, batch // (lanes * size)))
    # The sums of chunk totals in plain float32 must keep to their part of the bound, see RUN.
    while at_once > 1 and (at_once + RUN - 2) * RUN * at_once * size > RUN**2 * CHUNK:
        at_once //= 2
    steps = jax.tree.map(lambda leaf: _split(leaf, lanes, at_once, size), examples)

    def add_examples(step: Any) -> Array:
        # Without `vmap` a product stays a plain product, which XLA on a CPU computes faster.
        if at_once == 1:
            return function(jax.tree.map(lambda leaf: leaf[0], step))
        return jnp.sum(jax.vmap(function)(step), axis=0)

    if lanes == 1:
        return fold(add_examples, jax.tree.map(lambda leaf: leaf[:, 0], steps))
    return jnp.sum(fold(jax.vmap(add_examples), steps), axis=0)


def fold(function: Callable[[Any], PyTree], steps: Any) -> PyTree:
    """Sums `function(step)` over the leading axis of `steps`, in double words if they are many."""
    one = jax.tree.map(lambda leaf: leaf[0], steps)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, one)
    )

    def add_run(run: Any) -> PyTree:
        return jax.lax.scan(
            lambda total, step: (jax.tree.map(jnp.add, total, function(step)), None), zeros, run
        )[0]

    count = jax.tree.leaves(steps)[0].shape[0]
    if count <= RUN:
        return add_run(steps)

    def split(leaf: Array) -> Array:
        filled = jnp.pad(leaf, [(0, -count % RUN), *[(0, 0)] * (leaf.ndim - 1)])
        return filled.reshape(-1, RUN, *leaf.shape[1:])

    def add_to_total(total: tuple[PyTree, PyTree], run: Any) -> tuple[tuple[PyTree, PyTree], None]:
        return add_double_word(total, add_run(run)), None

    (high, low), _ = jax.lax.scan(add_to_total, (zeros, zeros), jax.tree.map(split, steps))
    return jax.tree.map(jnp.add, high, low)


def add_double_word(total: tuple[PyTree, PyTree], value: PyTree) -> tuple[PyTree, PyTree]:
    """Adds a tree of floats to a double-word total, with a relative error of at most 2 u^2.

    Algorithm 4, DWPlusFP, of Joldes, Muller and Popescu 2017. Integers are added as they are.
    """
    highs, lows, values = (jax.tree.leaves(tree) for tree in (*total, value))
    pairs = [_add(*leaves) for leaves in zip(highs, lows, values, strict=True)]
    treedef = jax.tree.structure(value)
    high, low = zip(*pairs, strict=True) if pairs else ((), ())
    return jax.tree.unflatten(treedef, high), jax.tree.unflatten(treedef, low)


def _add(high: Array, low: Array, value: Array) -> tuple[Array, Array]:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return high + value, low
    total = high + value
    other = total - high
    # What the addition above has lost, exactly.
    error = (high - (total - other)) + (value - other)
    rest = low + error
    renewed = total + rest
    return renewed, rest - (renewed - total)


def sum_stacked(weights: Float[Array, " batch"], rows: Float[Array, "batch ..."]) -> Array:
    """Returns `sum_i weights_i * rows_i`, chunk by chunk."""
    batch, lanes = len(rows), _num_lanes(len(rows))
    if batch <= CHUNK:
        return jnp.tensordot(weights, rows, axes=1, precision=jax.lax.Precision.HIGHEST)
    per_lane = batch // lanes
    chunks = -(-per_lane // CHUNK)
    size = -(-per_lane // chunks)

    def split(leaf: Array) -> Array:
        leaf = leaf.reshape(lanes, per_lane, *leaf.shape[1:])
        padding = (0, chunks * size - per_lane)
        filled = jnp.pad(leaf, [(0, 0), padding, *[(0, 0)] * (leaf.ndim - 2)])
        return filled.reshape(lanes, chunks, size, *leaf.shape[2:])

    flat = rows.reshape(batch, -1)
    parts = jnp.einsum(
        "lcb,lcbp->clp", split(weights), split(flat), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.sum(fold(lambda part: part, parts), axis=0).reshape(rows.shape[1:])


def _num_lanes(batch: int) -> int:
    """How many parts of the batch are summed side by side: one per device that may hold a part."""
    # Without lanes, each step of a loop would take rows from one device only, and send them to all.
    devices = jax.device_count()
    return devices if batch % devices == 0 else 1


def _split(leaf: Array, lanes: int, at_once: int, size: int) -> Array:
    """Reshapes `(batch, ...)` to `(steps, lanes, at_once, size, ...)`, with zeros at the end."""
    per_lane = leaf.shape[0] // lanes
    leaf = leaf.reshape(lanes, per_lane, *leaf.shape[1:])
    padding = (0, -per_lane % (at_once * size))
    filled = jnp.pad(leaf, [(0, 0), padding, *[(0, 0)] * (leaf.ndim - 2)])
    steps = filled.reshape(lanes, -1, at_once, size, *leaf.shape[2:])
    return jnp.moveaxis(steps, 1, 0)
