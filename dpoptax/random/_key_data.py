"""Typed keys in a tree as plain arrays, for formats that store arrays only."""

from typing import Any

import jax

from dpoptax import _validate
from dpoptax._pytree import PyTree


def key_data(tree: PyTree) -> PyTree:
    """Replaces each typed key in a tree by its words, as `jax.random.key_data` does for one key.

    Use it to store a train state in a format that has no typed keys, such as
    `flax.serialization.to_bytes` or `numpy.savez`. Orbax and pickle store typed keys themselves.
    What is stored contains the keys: protect it as you protect the training data.

    Args:
        tree: any tree, such as a `dpoptax.training.TrainState` or an Optax state.

    Returns:
        A tree of the same structure. The words of a key are uint32, in a last axis.

    Example:
        >>> import jax
        >>> key_data({"key": jax.random.key(0), "step": 3})["key"].shape
        (2,)
    """
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if _validate.is_key(leaf) else leaf, tree
    )


def wrap_key_data(tree: PyTree, like: PyTree) -> PyTree:
    """Restores the typed keys that `key_data` replaced.

    Args:
        tree: what `key_data` returned, or what was stored of it.
        like: a tree of the same structure with typed keys of the same types. Their values do not
            matter: it may be the state of a run that starts.

    Returns:
        A tree with the values of `tree` and the keys typed as in `like`.

    Raises:
        ValueError: the structures differ, or the words do not fit the type of a key.

    Example:
        >>> import flax.serialization, jax, dpoptax
        >>> def start():
        ...     return {"key": dpoptax.random.insecure_key(0), "step": jax.numpy.zeros(())}
        >>> stored = flax.serialization.to_bytes(key_data(start()))
        >>> like = start()
        >>> restored = wrap_key_data(flax.serialization.from_bytes(key_data(like), stored), like)
        >>> bool(restored["key"] == start()["key"])
        True
    """

    def restore(path: tuple[Any, ...], key: Any, words: Any) -> Any:
        if not _validate.is_key(key):
            return words
        expected = jax.eval_shape(jax.random.key_data, key)
        if jax.numpy.shape(words) != expected.shape:
            raise ValueError(
                f"expected {expected.shape} words for the key{jax.tree_util.keystr(path)}, of type "
                f"{jax.random.key_impl(key)}; got {jax.numpy.shape(words)}. Pass a tree `like` "
                "with keys of the type that was stored."
            )
        words = jax.numpy.asarray(words, jax.numpy.uint32)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))

    return jax.tree_util.tree_map_with_path(restore, like, tree)
