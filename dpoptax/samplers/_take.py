"""Gather the examples of a batch from data on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from dpoptax._explicit_axes import automatic_sharding, replicated_results, sharded_results
from dpoptax.samplers._base import Batch


@replicated_results
def take(
    data: PyTree[Shaped[Array, "num_examples ..."]], batch: Batch
) -> PyTree[Shaped[Array, "max_batch_size ..."]]:
    """Gathers the examples of `batch` from every array of `data`.

    Padded rows hold example 0. They must be masked: pass `batch.mask` to `per_example_grads`.

    Args:
        data: a tree of arrays with a leading axis of num_examples.
        batch: from a sampler.

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
        >>> sharded_take(sharding)({"x": jnp.array([10, 11, 12])}, batch)["x"].tolist()
        [12, 10]
    """

    def take_and_shard(data: PyTree, batch: Batch) -> PyTree:
        examples = take(data, batch)
        # `with_sharding_constraint` would raise too, but could not say what to change.
        for leaf in jax.tree.leaves(examples):
            try:
                sharding.shard_shape(leaf.shape)
            except ValueError:
                size, devices = len(batch.mask), len(sharding.device_set)
                fits = -(-size // devices) * devices
                raise ValueError(
                    f"a batch must divide evenly over {devices} devices; got {size} rows. Make the "
                    f"sampler with a max_batch_size (or batch_size) of {fits}, say."
                ) from None
        return jax.lax.with_sharding_constraint(examples, automatic_sharding(sharding))

    return sharded_results(take_and_shard, sharding)
