"""Gather the examples of a batch, from data on the device or on the host."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from dpoptax import _markers, _validate
from dpoptax._explicit_axes import automatic_sharding, replicated_results, sharded_results
from dpoptax._masked_examples import MaskedExamples
from dpoptax._pytree import PyTree
from dpoptax.samplers._base import Batch


@replicated_results
def take(data: PyTree[Shaped[Any, "num_examples ..."]], batch: Batch) -> MaskedExamples:
    """Gathers the examples of `batch` from every array of `data`, together with their mask.

    Padded rows are zeros. The mask stays with the examples: the functions of `per_example_grads`
    apply it, so there is no `mask` to pass.

    NumPy arrays and memory maps with a batch of `iterate_batches` stay on the host, and only the
    rows of the batch are read.

    Args:
        data: a tree of arrays with a leading axis of num_examples.
        batch: from a sampler.

    Returns:
        `MaskedExamples`: a tree like `data` with a leading axis of max_batch_size, and the mask.

    Raises:
        ValueError: the arrays have no common leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = Batch(jnp.array([2, 3]), jnp.array([True, False]))
        >>> taken = take({"x": jnp.array([10, 11, 12])}, batch)
        >>> taken.examples, taken.mask
        ({'x': Array([12,  0], dtype=int32)}, Array([ True, False], dtype=bool))
    """
    size = _validate.leading_axis_size("data", data)
    if _markers.active():
        return MaskedExamples(*_markers.taken(data, batch.indices, batch.mask))
    on_host = isinstance(batch.indices, np.ndarray)
    mask = batch.mask
    if not (on_host and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(data))):
        # An index that points at no example is padding, whatever the sampler says.
        mask = batch.mask & (batch.indices >= 0) & (batch.indices < size)
        rows = jnp.where(mask, batch.indices, size)
        return MaskedExamples(jax.tree.map(lambda leaf: _gather(leaf, rows), data), mask)
    indices = np.asarray(batch.indices)
    inside = np.asarray(mask) & (indices >= 0) & (indices < size)
    real = indices[inside]
    return MaskedExamples(
        jax.tree.map(lambda leaf: fill_rows(np.asarray(leaf[real]), inside), data), inside
    )


def _gather(leaf: Array, rows: Array) -> Array:
    """Returns rows of an array, and zeros for rows beyond its end."""
    if _validate.is_key(leaf):
        data = _gather(jax.random.key_data(leaf), rows)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.take(leaf, rows, axis=0, mode="fill", fill_value=0)


def fill_rows(
    rows: Shaped[np.ndarray, "real ..."], mask: np.ndarray
) -> Shaped[np.ndarray, "batch ..."]:
    """Puts rows where the mask is True, in order, and zeros elsewhere."""
    filled = np.zeros((*mask.shape, *rows.shape[1:]), rows.dtype)
    filled[mask] = rows
    return filled


def sharded_take(sharding: jax.sharding.Sharding) -> Callable[[PyTree, Batch], MaskedExamples]:
    """Returns a `take` that distributes the examples of a batch over devices.

    Args:
        sharding: of the leading axis of a batch, such as
            `NamedSharding(mesh, PartitionSpec("data"))`. The axes of the mesh may be automatic or
            explicit.

    Returns:
        A function like `take`, for `dpoptax.training`.

    Raises:
        ValueError: when the returned function is called with a batch that cannot be divided
            evenly over the devices.

    Example:
        >>> import jax, numpy as np, jax.numpy as jnp
        >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        >>> sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        >>> batch = Batch(jnp.array([2, 0]), jnp.array([True, False]))
        >>> sharded_take(sharding)({"x": jnp.array([10, 11, 12])}, batch).examples["x"].tolist()
        [12, 0]
    """

    def take_and_shard(data: PyTree, batch: Batch) -> MaskedExamples:
        examples = take(data, batch)
        # `with_sharding_constraint` would raise too, but could not say what to change.
        for leaf in jax.tree.leaves(examples):
            try:
                sharding.shard_shape(leaf.shape)
            except ValueError:
                size, devices = len(batch.mask), _num_shards(sharding)
                if size % devices == 0:
                    raise
                fits = -(-size // devices) * devices
                raise ValueError(
                    f"a batch must divide evenly over {devices} devices; got {size} rows. Make the "
                    f"sampler of the plan with a max_batch_size (or batch_size) of {fits}, say."
                ) from None
        sharded: MaskedExamples = jax.lax.with_sharding_constraint(
            examples, automatic_sharding(sharding)
        )
        return sharded

    return sharded_results(take_and_shard, sharding)


def _num_shards(sharding: jax.sharding.Sharding) -> int:
    """Over how many devices the leading axis is divided; the others hold copies of its parts."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return len(sharding.device_set)
    names = sharding.spec[0] if len(sharding.spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(sharding.mesh.shape[name] for name in names)
