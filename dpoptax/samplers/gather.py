"""Data on the device and a batch of indices in, the examples of the batch out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from dpoptax.samplers.protocol import Batch


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
