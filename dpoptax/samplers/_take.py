"""Gather the examples of a batch from data on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import Array, PyTree, Shaped

from dpoptax._explicit_axes import (
    automatic_sharding,
    is_explicit,
    replicated,
    run_with_automatic_axes,
)
from dpoptax.samplers._base import Batch


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
    return run_with_automatic_axes(_gather, data, batch, specs_of=replicated)


def _gather(data: PyTree, batch: Batch) -> PyTree:
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
        mesh = _explicit_mesh(sharding, data)
        if mesh is None:
            examples = _gather(data, batch)
            _check_divides(sharding, examples, len(batch.mask))
            return jax.lax.with_sharding_constraint(examples, automatic_sharding(sharding))

        def specs_of(examples: PyTree) -> PyTree:
            _check_divides(sharding, examples, len(batch.mask))
            spec = getattr(sharding, "spec", None)
            return jax.tree.map(lambda _: spec, examples)

        return run_with_automatic_axes(_gather, data, batch, specs_of=specs_of, mesh=mesh)

    # `fit` runs with automatic axes, and reads here whether a mesh has explicit ones.
    take_and_shard.sharding = sharding  # type: ignore[attr-defined]
    return take_and_shard


def _explicit_mesh(sharding: jax.sharding.Sharding, data: PyTree) -> AbstractMesh | None:
    """Returns the mesh of the result, if it has explicit axes."""
    if not isinstance(sharding, NamedSharding) or not is_explicit(sharding.mesh):
        return None
    # Arrays that are on the mesh already, or the context, say which kind of axes is in use here.
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(data)]
    used = [mesh for mesh in (*meshes, jax.sharding.get_abstract_mesh()) if not mesh.empty]
    return sharding.mesh.abstract_mesh if not used or is_explicit(used[0]) else None


def _check_divides(sharding: jax.sharding.Sharding, examples: PyTree, size: int) -> None:
    # JAX would raise too, but could not say what to change.
    for leaf in jax.tree.leaves(examples):
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            devices = len(sharding.device_set)
            fits = -(-size // devices) * devices
            raise ValueError(
                f"a batch must divide evenly over {devices} devices; got {size} rows. Make the "
                f"sampler with a max_batch_size (or batch_size) of {fits}, say."
            ) from None
