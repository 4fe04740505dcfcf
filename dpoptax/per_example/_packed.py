"""Packing of 16-bit floats as their bits, so that a loop does not cast a whole array.

XLA on a CPU has few operations for bfloat16. It casts what a loop slices to float32, before the
loop, which takes twice the memory of the array. It slices integers as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax._pytree import PyTree


def pack(tree: PyTree) -> PyTree:
    """Returns a tree with 16-bit floats as their bits, uint16."""
    return jax.tree.map(
        lambda leaf: jax.lax.bitcast_convert_type(leaf, jnp.uint16) if _is_narrow(leaf) else leaf,
        tree,
    )


def unpack(packed: PyTree, like: PyTree) -> PyTree:
    """Returns a packed tree, or a part of each of its leaves, with the dtypes of `like`."""

    def restore(leaf: Array, original: Any) -> Array:
        if not _is_narrow(original):
            return leaf
        return jax.lax.bitcast_convert_type(leaf, original.dtype)

    return jax.tree.map(restore, packed, like)


def _is_narrow(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 2
