"""Data on the device and a batch of indices in, the examples of the batch out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from dpoptax.samplers._base import Batch


def take(
    data: PyTree[Shaped[Array, "num_examples ..."]], batch: Batch
) -> PyTree[Shaped[Array, "max_batch_size ..."]]:
    """Gathers the examples of `batch` from every array of `data`.

    Padded rows hold example 0 and must be masked: pass `batch.mask` on.

    Args:
        data: a tree of arrays with a leading axis of num_examples.
        batch: as a sampler draws it.

    Returns:
        A tree like `data` with a leading axis of max_batch_size.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = Batch(jnp.array([2, 0]), jnp.array([True, False]))
        >>> take({"x": jnp.array([10, 11, 12])}, batch)["x"]
        Array([12, 10], dtype=int32)
    """
    rows = jnp.where(batch.mask, batch.indices, 0)
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), data)


def sharded_take(sharding: jax.sharding.Sharding) -> Callable[[PyTree, Batch], PyTree]:
    """Returns a `take` that lays the examples of a batch out over devices.

    Args:
        sharding: of a batch, such as `NamedSharding(mesh, PartitionSpec("data"))`, on a mesh of
            axes that the compiler shards by itself, `jax.sharding.Mesh(devices, names)`.

    Returns:
        A function like `take`, for `dpoptax.training`.

    Raises:
        ValueError: when used, a batch that does not divide over the devices.

    Example:
        >>> import jax, numpy as np, jax.numpy as jnp
        >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        >>> sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        >>> batch = Batch(jnp.array([2, 0]), jnp.array([True, False]))
        >>> sharded_take(sharding)({"x": jnp.array([10, 11, 12])}, batch)["x"].tolist()
        [12, 10]
    """

    def spread(data: PyTree, batch: Batch) -> PyTree:
        examples = take(data, batch)
        for leaf in jax.tree.leaves(examples):
            try:
                sharding.shard_shape(leaf.shape)
            except ValueError:
                devices = len(sharding.device_set)
                raise ValueError(
                    f"a batch of {len(batch.mask)} places does not divide over {devices} devices. "
                    "Make the sampler with max_batch_size, a multiple of the devices."
                ) from None
        return jax.lax.with_sharding_constraint(examples, sharding)

    return spread
