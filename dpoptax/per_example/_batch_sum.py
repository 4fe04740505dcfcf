"""Sums over the batch whose rounding errors do not grow with the batch.

A plain float32 sum over a large batch can let one example move the result by more than its clipped
gradient: where a partial sum is large, or passes a power of two, the terms that follow are rounded
in another way. So a few examples are added in float32 at a time, and their totals are added in
double-word arithmetic: as an unevaluated sum of two floats, with about 48 bits. `docs/numerics.md`
states what this proves, and how the constants below enter.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._pytree import PyTree
from dpoptax.per_example._packed import pack, unpack

# How many examples are added in float32 at a time, if each adds one term to a number. The rounding
# errors of such chunks move the sum by at most 1/64 of the clip bound, and grow with their square.
CHUNK = 256

# So many chunk totals are added in float32 before their sum joins the double-word total.
RUN = 4

# Up to so many chunks are worked on one by one. Measured for 384 x 1536 weights, 32 tokens and 128
# examples on a CPU: 4 products by `vmap` take 13 times as long as 4 plain products.
MAX_UNROLLED = 8

# Limits the errors of the additions in such a run, see `_float32_additions`.
MAX_FLOAT32_ADDITIONS = RUN * (RUN - 1) * CHUNK

# The terms of an example whose gradient is clipped may be this many clip bounds large. This limits
# examples that add several terms to a number, if more than one of them is in a chunk.
MAX_CANCELLATION = 256.0


def examples_per_chunk(num_terms: int) -> int:
    """How many examples may be added at a time, if each adds `num_terms` terms per number.

    The errors of chunks of m examples with T terms are at most 4 u m^2 T^(3/2) MAX_CANCELLATION
    clip bounds. This is the largest power of two that keeps them below 1/256. One example at a time
    has no such error, because its gradient does not depend on other examples.
    """
    if num_terms <= 1:
        return CHUNK
    size = CHUNK
    while size > 1 and size**2 * num_terms**1.5 * MAX_CANCELLATION > CHUNK**2 / 4:
        size //= 2
    return size


def sum_in_chunks(
    function: Callable[[Any], Array],
    examples: Any,
    size: int,
    at_once: int,
    *,
    side_by_side: bool = False,
) -> Array:
    """Sums `function`, a float32 sum over a few examples, over chunks of `size` examples.

    `function` must be zero for examples that are all zeros, as padding is. Up to `at_once` chunks
    are worked on together, by `vmap`, and with `side_by_side` all chunks if they need no loop.
    """
    batch = jax.tree.leaves(examples)[0].shape[0]
    if batch <= size:
        return function(examples)
    lanes = num_lanes(batch)
    size = balanced(batch // lanes, size)
    if lanes == 1 and _without_loop(batch, size):
        if side_by_side:
            # XLA copies the slices that it multiplies. For a vector, this takes longer than the
            # product: with 1,024 rows of 104 numbers, the sum takes half of the time side by side.
            chunks = jax.tree.map(lambda leaf: _split(leaf, 1, 1, size)[:, 0, 0], examples)
            return _sum_of_parts(list(jax.vmap(function)(chunks)))
        return _sum_of_parts([function(part) for part in _parts(examples, size)])
    at_once = 2 ** (max(1, min(at_once, batch // (lanes * size))).bit_length() - 1)
    while at_once > 1 and _float32_additions(RUN, at_once, size) > MAX_FLOAT32_ADDITIONS:
        at_once //= 2
    # As many steps, with as little padding as they allow.
    at_once = balanced(-(-batch // (lanes * size)), at_once)
    steps = jax.tree.map(lambda leaf: _split(leaf, lanes, at_once, size), pack(examples))

    def add_examples(step: Any) -> Array:
        step = unpack(step, examples)
        # Without `vmap` a product stays a plain product, which XLA on a CPU computes faster.
        if at_once <= MAX_UNROLLED:
            chunks = [jax.tree.map(lambda leaf, i=i: leaf[i], step) for i in range(at_once)]
            return functools.reduce(jnp.add, map(function, chunks))
        return jnp.sum(jax.vmap(function)(step), axis=0)

    if lanes == 1:
        return fold(add_examples, jax.tree.map(lambda leaf: leaf[:, 0], steps), at_once * size)
    return jnp.sum(fold(jax.vmap(add_examples), steps, at_once * size), axis=0)


def fold(function: Callable[[Any], PyTree], steps: Any, num_examples: int) -> PyTree:
    """Sums `function(step)` over the leading axis of `steps`, in double words if they are many.

    Each step holds `num_examples` examples.
    """
    return fold_and_stack(lambda step: (function(step), None), steps, num_examples)[0]


def fold_and_stack(
    function: Callable[[Any], tuple[PyTree, PyTree]], steps: Any, num_examples: int
) -> tuple[PyTree, PyTree]:
    """As `fold`, for a function that returns what to sum and what to stack."""
    run, count = longest_run(num_examples), jax.tree.leaves(steps)[0].shape[0]
    one = jax.tree.map(lambda leaf: leaf[0], steps)
    shapes, _ = jax.eval_shape(function, one)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add_run(steps: Any) -> tuple[PyTree, PyTree]:
        def add(total: PyTree, step: Any) -> tuple[PyTree, PyTree]:
            value, output = function(step)
            return jax.tree.map(jnp.add, total, value), output

        return jax.lax.scan(add, zeros, steps)

    if count <= run:
        return add_run(steps)

    # Runs of one length need no padding, which would copy all steps.
    run = max(length for length in range(1, run + 1) if count % length == 0)

    def add_to_total(total: tuple[PyTree, PyTree], run: Any) -> tuple[tuple[PyTree, PyTree], Any]:
        value, outputs = add_run(run)
        return add_double_word(total, value), outputs

    runs = jax.tree.map(lambda leaf: leaf.reshape(count // run, run, *leaf.shape[1:]), steps)
    (high, low), outputs = jax.lax.scan(add_to_total, (zeros, zeros), runs)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), outputs)
    return jax.tree.map(jnp.add, high, low), stacked


def longest_run(num_examples: int) -> int:
    """How many totals of so many examples are added in float32 before they join the double word."""
    run = RUN
    while run > 1 and _float32_additions(run, 1, num_examples) > MAX_FLOAT32_ADDITIONS:
        run -= 1
    return run


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
    batch, lanes = len(rows), num_lanes(len(rows))
    if batch <= CHUNK:
        return _weighted(weights, rows)
    size = balanced(batch // lanes, CHUNK)
    if lanes == 1 and _without_loop(batch, size):
        pairs = _parts((weights, rows), size)
        return _sum_of_parts([_weighted(scales, part) for scales, part in pairs])
    flat = rows.reshape(batch, math.prod(rows.shape[1:]))
    # (chunks, lanes, size), and the same with an axis of numbers.
    scales, leaves = (_split(leaf, lanes, 1, size)[:, :, 0] for leaf in (weights, flat))
    parts = jnp.einsum("clb,clbp->clp", scales, leaves, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(fold(lambda part: part, parts, size), axis=0).reshape(rows.shape[1:])


def _weighted(weights: Array, rows: Array) -> Array:
    return jnp.tensordot(weights, rows, axes=1, precision=jax.lax.Precision.HIGHEST)


def _float32_additions(run: int, at_once: int, num_examples: int) -> int:
    """Additions of chunk totals in one run, times the examples in it."""
    return (at_once + run - 2) * run * at_once * num_examples


def balanced(rows: int, size: int) -> int:
    """The size of chunks of nearly equal sizes, at most `size`."""
    chunks = -(-rows // size)
    return -(-rows // chunks)


def num_lanes(batch: int) -> int:
    """How many parts of the batch are worked on side by side: one per device that may hold a part.

    Without lanes, each step of a loop would take rows from one device only, and send them to all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.gcd(batch, jax.device_count() if mesh.empty else mesh.size)


def _parts(examples: Any, size: int) -> list[Any]:
    """Slices of at most `size` examples."""
    batch = jax.tree.leaves(examples)[0].shape[0]
    return [
        jax.tree.map(lambda leaf, start=start: leaf[start : start + size], examples)
        for start in range(0, batch, size)
    ]


def _without_loop(batch: int, size: int) -> bool:
    """Whether the chunks are so few that a loop over them would be slower."""
    # XLA copies the arrays that it loops over. Measured on a CPU without the loop: at 512 examples,
    # a step of logistic regression takes 0.63 of the time, and one of two dense layers 0.86; at
    # 1,112 examples, a step of a VAE takes 0.87. Small chunks would only make the program longer.
    chunks = -(-batch // size)
    return chunks <= RUN or (chunks <= 2 * RUN and 2 * size >= CHUNK)


def _sum_of_parts(totals: list[Array]) -> Array:
    """Sums the totals of chunks: those of a run in float32, and two runs by one more addition."""
    runs = [totals[start : start + RUN] for start in range(0, len(totals), RUN)]
    # The double-word sum of two floats, rounded to one float, is their float32 sum.
    return functools.reduce(jnp.add, [functools.reduce(jnp.add, run) for run in runs])


def _split(leaf: Array, lanes: int, at_once: int, size: int) -> Array:
    """Reshapes `(batch, ...)` to `(steps, lanes, at_once, size, ...)`, with zeros at the end."""
    per_lane = leaf.shape[0] // lanes
    leaf = leaf.reshape(lanes, per_lane, *leaf.shape[1:])
    padding = (0, -per_lane % (at_once * size))
    filled = jnp.pad(leaf, [(0, 0), padding, *[(0, 0)] * (leaf.ndim - 2)])
    num_steps = filled.shape[1] // (at_once * size)
    steps = filled.reshape(lanes, num_steps, at_once, size, *leaf.shape[2:])
    return jnp.moveaxis(steps, 1, 0)
