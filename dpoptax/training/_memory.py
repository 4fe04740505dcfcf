"""A loss, shapes and a memory limit in, the largest microbatch that fits out.

From what the compiler says of the program and from public shapes alone: nothing is run.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dpoptax import _validate
from dpoptax.clipping import FlatClip
from dpoptax.per_example import PerExampleGrads, per_example_grads
from dpoptax.per_example._validate_loss import takes_key

# Of what the device has, for a step beside parameters, optimizer and data.
SHARE_OF_MEMORY = 0.5


def choose_microbatch_size(
    loss_fn: Callable[..., Any],
    params: PyTree,
    example: PyTree,
    *,
    max_batch_size: int,
    memory_limit: int | None = None,
) -> int | None:
    """Returns the largest microbatch whose temporary memory keeps to a limit.

    Whole batches are tried first, then halves of halves. Each try compiles the clipped sum.

    Args:
        loss_fn: of one example, as in `dpoptax.per_example_grads`.
        params: arrays or `jax.ShapeDtypeStruct`; only shapes and types are looked at.
        example: one example, likewise.
        max_batch_size: the static size of a batch, `sampler.max_batch_size`.
        memory_limit: in bytes; by default half of what the device has.

    Returns:
        A number for `microbatch_size`, or None if whole batches fit.

    Raises:
        ValueError: not even one example at a time fits.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss_fn(params, x):
        ...     return jnp.sum(jnp.cumsum(params * x) ** 2)
        >>> wide = jax.ShapeDtypeStruct((100_000,), jnp.float32)
        >>> x = jax.ShapeDtypeStruct((), jnp.float32)
        >>> choose_microbatch_size(loss_fn, wide, x, max_batch_size=48, memory_limit=10**9)
        >>> choose_microbatch_size(loss_fn, wide, x, max_batch_size=48, memory_limit=10**7) < 48
        True
    """
    limit = (
        default_limit() if memory_limit is None else _validate.count("memory_limit", memory_limit)
    )
    size = _validate.count("max_batch_size", max_batch_size)
    rule = FlatClip(1.0)
    return largest_part(
        loss_fn, params, example, lambda grads: grads.clip_and_sum(rule.weights), size, limit
    )


def largest_part(
    loss_fn: Callable[..., Any],
    params: PyTree,
    example: PyTree,
    released: Callable[[PerExampleGrads], PyTree],
    size: int,
    limit: int,
) -> int | None:
    """As `choose_microbatch_size`, by the memory of whatever is released of the gradients."""
    key = jax.random.key(0) if takes_key(loss_fn) else None

    def shapes(tree: PyTree, *lead: int) -> PyTree:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*lead, *jnp.shape(leaf)), leaf.dtype), tree
        )

    def needed(microbatch_size: int | None) -> int:
        grads_fn = per_example_grads(loss_fn, microbatch_size=microbatch_size)

        def release(params: PyTree, examples: PyTree) -> PyTree:
            return released(grads_fn(params, examples, key=key))

        lowered = jax.jit(release).lower(shapes(params), shapes(example, size))
        analysis = lowered.compile().memory_analysis()
        return 0 if analysis is None else int(analysis.temp_size_in_bytes)

    found = needed(None)
    if found <= limit:
        return None
    part = 1 << max(size - 1, 1).bit_length() - 1
    while part >= 1:
        found = needed(part)
        if found <= limit:
            return part
        part //= 2
    raise ValueError(
        f"one example at a time takes {found:,} bytes beside parameters and data, and the limit is "
        f"{limit:,}. Shard the parameters over more devices, or take a smaller model."
    )


def default_limit() -> int:
    """Half of what the device has, in bytes."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    total = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(SHARE_OF_MEMORY * total)
