"""Conversion between the leaves of a train state and plain arrays that Orbax can store.

A PRNG key becomes its key data; an array without elements is left out, because Orbax refuses it.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.random._chacha import KEY_TYPES, ROUNDS

# Folders of earlier versions have the last name.
CHACHA_ROUNDS = ROUNDS | {"cc20": 20}
# Shape, dtype and PRNG implementation of a leaf, as JSON.
Description = list[Any]


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by the names of their paths."""
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe(leaf: Any) -> Description:
    """Returns shape, dtype and, for a key, its PRNG implementation."""
    data = _data(leaf)
    impl = str(jax.random.key_impl(leaf)) if _validate.is_key(leaf) else None
    return [list(data.shape), data.dtype.name, impl]


def describe_all(tree: PyTree) -> dict[str, Description]:
    """Returns the description of every leaf by its name."""
    return {name: describe(leaf) for name, leaf in named_leaves(tree).items()}


def encode(tree: PyTree) -> dict[str, Array]:
    """Returns the leaves as plain arrays, by their number."""
    leaves = named_leaves(tree).values()
    return {str(number): _data(leaf) for number, leaf in enumerate(leaves) if leaf.size}


def targets(like: PyTree, descriptions: dict[str, Description]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what Orbax needs to restore the arrays with the sharding of `like`."""
    found = {}
    for number, (name, leaf) in enumerate(named_leaves(like).items()):
        shape, dtype, _ = descriptions[name]
        if 0 not in shape:
            sharding = getattr(_data(leaf), "sharding", None)
            found[str(number)] = jax.ShapeDtypeStruct(
                tuple(shape), jnp.dtype(dtype), sharding=sharding
            )
    return found


def decode(arrays: dict[str, Array], like: PyTree, descriptions: dict[str, Description]) -> PyTree:
    """Returns a tree of the structure of `like` with the stored arrays."""
    found = []
    for number, (name, leaf) in enumerate(named_leaves(like).items()):
        if str(number) not in arrays:  # an array without elements
            found.append(leaf)
            continue
        array = arrays[str(number)]
        if not getattr(_data(leaf), "committed", False):
            array = _uncommitted(array)
        found.append(_key(array, descriptions[name][2]))
    return jax.tree.unflatten(jax.tree.structure(like), found)


def digest(arrays: dict[str, Array]) -> str:
    """Returns a digest of the arrays that this process can read."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        if arrays[name].is_fully_addressable:
            found.update(np.asarray(arrays[name]).tobytes())
    return found.hexdigest()


def _data(leaf: Any) -> Array:
    return jax.random.key_data(leaf) if _validate.is_key(leaf) else jnp.asarray(leaf)


def _uncommitted(array: Array) -> Array:
    """Copies a single-device array: committed inputs compile to a different program."""
    return jnp.asarray(np.asarray(array)) if len(array.sharding.device_set) == 1 else array


def _key(data: Array, impl: str | None) -> Array:
    if impl is None:
        return data
    rounds = CHACHA_ROUNDS.get(impl)
    return jax.random.wrap_key_data(data, impl=impl if rounds is None else KEY_TYPES[rounds])
