"""Choice of the largest microbatch that fits into memory.

The compiler reports how much memory a program needs, so nothing runs. Only public shapes are used.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from dpoptax import _validate
from dpoptax._explicit_axes import automatic_sharding
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.clipping import FlatClip
from dpoptax.mechanisms._state import NoiseKeys
from dpoptax.per_example import PerExampleGrads, value_and_per_example_grads
from dpoptax.per_example._parts import shards_of
from dpoptax.per_example._validate_loss import check_loss, takes_key
from dpoptax.training._objective import Objective, split_objective
from dpoptax.training._train_step import TrainState
from dpoptax.transforms._release import SumRelease

# The fraction of the device's memory for the temporaries of a step. The rest is for parameters,
# optimizer state and data, which the compiler's number leaves out.
MEMORY_FRACTION = 0.5
_known_bytes: dict[bytes, int] = {}


def choose_microbatch_size(
    loss_fn: Callable[..., Any],
    params: PyTree,
    example: PyTree,
    *,
    max_batch_size: int,
    memory_limit: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> int | None:
    """Returns the largest microbatch size whose temporary memory stays below a limit.

    It tries the whole batch first, then powers of two from large to small; on several devices,
    these numbers of examples for each device. Each try compiles the clipped sum.

    Args:
        loss_fn: the loss of one example, as in `dpoptax.per_example_grads`.
        params: arrays or `jax.ShapeDtypeStruct`; only shapes, dtypes and shardings matter.
        example: one example; only shapes and dtypes matter.
        max_batch_size: the static size of a batch, `sampler.max_batch_size`.
        memory_limit: in bytes, for each device; by default half of the device's memory.
        sharding: how a batch is spread over devices, as in `dpoptax.samplers.sharded_take`. None
            means that each device holds the whole batch.

    Returns:
        A number for `microbatch_size`, or None if the whole batch fits.

    Raises:
        ValueError: a single example, or one for each device, does not fit.

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
    clip = FlatClip(1.0)
    return _largest_microbatch(
        loss_fn,
        params,
        example,
        lambda grads: grads.clip_and_sum(clip.weights),
        size,
        limit,
        sharding,
    )


def microbatch_size_for_plan(
    loss_fn: Callable[..., Any] | Objective,
    state: TrainState,
    examples: PyTree,
    plan: Plan,
    sharding: jax.sharding.Sharding | None = None,
) -> int | None:
    """Returns the largest microbatch size for the release that a plan makes."""
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), examples)
    loss_of, point_of = split_objective(loss_fn)
    point = jax.eval_shape(point_of, state.params, state.opt_state)

    sum_release = SumRelease(
        plan.clip, plan.noise_multiplier, plan.sampler.expected_batch_size, plan.mechanism
    )

    def release(grads: PerExampleGrads) -> PyTree:
        # Only compiled, never run: this key draws nothing.
        key = jax.random.key(0)
        first = sum_release.init(grads.parameter_specs(), key)
        return sum_release(NoiseKeys(key, key, ""), grads, first, 0)

    size = plan.sampler.max_batch_size
    return _largest_microbatch(loss_of, point, example, release, size, default_limit(), sharding)


def default_limit() -> int:
    """Returns half of the device's memory, in bytes."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    total = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(MEMORY_FRACTION * total)


def _has_aux(loss_fn: Callable[..., Any], params: PyTree, example: PyTree, key: Any) -> bool:
    """Whether a loss returns a pair `(loss, aux)`."""
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *jnp.shape(leaf)), jnp.result_type(leaf)), example
    )
    trace = check_loss(loss_fn, params, one, key, has_aux=None, allow_unused=True)
    return trace.program.aux_treedef is not None


def _largest_microbatch(
    loss_fn: Callable[..., Any],
    params: PyTree,
    example: PyTree,
    release: Callable[[PerExampleGrads], PyTree],
    size: int,
    limit: int,
    sharding: jax.sharding.Sharding | None,
) -> int | None:
    """As `choose_microbatch_size`, for any function of the gradients."""
    key = jax.random.key(0) if takes_key(loss_fn) else None
    # Only the release is measured, so it does not matter here whether every parameter is used.
    options: dict[str, Any] = {
        "has_aux": _has_aux(loss_fn, params, example, key),
        "allow_unused": True,
    }

    shards = shards_of(sharding, size) or 1
    batch = automatic_sharding(sharding) if shards > 1 else None

    def spec(leaf: Any) -> jax.ShapeDtypeStruct:
        own = getattr(leaf, "sharding", None)
        own = automatic_sharding(own) if isinstance(own, NamedSharding) else None
        return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=own)

    def rows(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *jnp.shape(leaf)), leaf.dtype, sharding=batch)

    def bytes_needed(microbatch_size: int | None) -> int:
        grads_fn = value_and_per_example_grads(loss_fn, microbatch_size=microbatch_size, **options)

        def step(params: PyTree, examples: PyTree) -> PyTree:
            return release(grads_fn(params, examples, key=key)[1])

        lowered = jax.jit(step).lower(jax.tree.map(spec, params), jax.tree.map(rows, example))
        # Equal programs need equal memory, so a second run of one need not compile it.
        program = hashlib.sha256(lowered.as_text().encode()).digest()
        if program not in _known_bytes:
            analysis = lowered.compile().memory_analysis()
            _known_bytes[program] = 0 if analysis is None else int(analysis.temp_size_in_bytes)
        return _known_bytes[program]

    needed = bytes_needed(None)
    if needed <= limit:
        return None
    # The largest power of two below the batch size: few compilations, and few leftover rows.
    each = 1 << max(size // shards - 1, 1).bit_length() - 1
    while each >= 1:
        needed = bytes_needed(each * shards)
        if needed <= limit:
            return each * shards
        each //= 2
    raise ValueError(
        f"one example at a time needs {needed:,} bytes plus parameters and data, and the limit "
        f"is {limit:,}. Shard the parameters over more devices, or use a smaller model."
    )
