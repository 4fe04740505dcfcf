"""How a function with batch axes in some arguments becomes a loss of one example."""

from collections.abc import Mapping
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np

from dpoptax import _validate
from dpoptax._masked_examples import unmasked
from dpoptax._pytree import PyTree


@attrs.frozen
class Arguments:
    """The arguments of one call, by what happens to them.

    Attributes:
        params: what is differentiated.
        rows: arrays with a leading batch axis: the batch arguments, keys, and keyword arguments.
        shared: the other arguments, the same for all examples. Not only arrays.
    """

    params: PyTree
    rows: dict[str, Any]
    shared: dict[int, Any]


@attrs.frozen
class CallLayout:
    """Which positional arguments are trained, and which have a batch axis.

    Attributes:
        argnums: the arguments to differentiate with respect to, a tuple or one number.
        batch_argnums: the arguments with a leading batch axis.
        prng_argnum: the argument with PRNG keys that are split into one key per example.
        keep_batch_dim: whether the function takes a batch of one example.
    """

    argnums: int | tuple[int, ...]
    batch_argnums: tuple[int, ...]
    prng_argnum: int | None
    keep_batch_dim: bool

    def __attrs_post_init__(self) -> None:
        trained = _as_tuple(self.argnums)
        if not self.batch_argnums:
            raise ValueError(
                "Batch Argnums must not be empty: expected the numbers of the arguments with a "
                "batch axis; got batch_argnums=(). Pass for example batch_argnums=1."
            )
        if min(*trained, *self.batch_argnums) < 0:
            raise ValueError(
                f"argument numbers must be >= 0; got argnums={self.argnums} and "
                f"batch_argnums={self.batch_argnums}. Count from the first argument."
            )
        if shared := set(trained) & set(self.batch_argnums):
            raise ValueError(
                "an argument is trained or has a batch axis, not both; got argnums="
                f"{self.argnums} and batch_argnums={self.batch_argnums} with overlap "
                f"{sorted(shared)}. Leave it out of one of them."
            )

    def split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Returns the arguments of a call, by what happens to them."""
        trained = _as_tuple(self.argnums)
        needed = max(*trained, *self.batch_argnums, self.prng_argnum or 0)
        if len(args) <= needed:
            raise ValueError(
                f"expected at least {needed + 1} positional arguments, because argnums, "
                f"batch_argnums or prng_argnum name argument {needed}; got {len(args)}."
            )
        batch = {number: args[number] for number in self.batch_argnums}
        size = _batch_size(batch, kwargs)
        others = {*range(len(args))} - {*trained, *self.batch_argnums}
        shared = {number: args[number] for number in sorted(others)}
        keys = {}
        if self.prng_argnum in shared:
            seeds = shared.pop(self.prng_argnum)
            keys[self.prng_argnum] = jax.tree.map(lambda key: jax.random.split(key, size), seeds)
        params = (
            args[self.argnums]
            if isinstance(self.argnums, int)
            else tuple(args[number] for number in self.argnums)
        )
        # Keys that all examples share become rows too: dpoptax refuses keys that are constants.
        leaves, _ = jax.tree.flatten(shared)
        repeated = {
            place: jnp.broadcast_to(leaf, (size, *leaf.shape))
            for place, leaf in enumerate(leaves)
            if _is_key(leaf)
        }
        rows = {"batch": batch, "keys": keys, "repeated": repeated, "kwargs": dict(kwargs)}
        return Arguments(params, rows, shared)

    def join(
        self, params: PyTree, row: dict[str, Any], shared: dict[int, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Returns the arguments of the function for one example."""
        batch = row["batch"]
        if self.keep_batch_dim:
            batch = jax.tree.map(lambda leaf: leaf[None], batch)
        trained = (
            {self.argnums: params}
            if isinstance(self.argnums, int)
            else dict(zip(self.argnums, params, strict=True))
        )
        leaves, structure = jax.tree.flatten(shared)
        leaves = [row["repeated"].get(place, leaf) for place, leaf in enumerate(leaves)]
        shared = jax.tree.unflatten(structure, leaves)
        given = {**shared, **row["keys"], **batch, **trained}
        return [given[number] for number in range(len(given))], row["kwargs"]


def _as_tuple(numbers: int | tuple[int, ...]) -> tuple[int, ...]:
    return (numbers,) if isinstance(numbers, int) else numbers


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is one PRNG key, typed or of the older kind, two integers."""
    if not isinstance(leaf, jax.Array):
        return False
    return _validate.is_key(leaf) or (leaf.dtype == jnp.uint32 and leaf.shape == (2,))


def _batch_size(batch: dict[int, Any], kwargs: Mapping[str, Any]) -> int:
    plain, _ = unmasked((batch, dict(kwargs)))
    named = {
        f"argument {number}{jax.tree_util.keystr(path)}": np.shape(leaf)
        for number, tree in {**plain[0], **plain[1]}.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for name, shape in named.items():
        if not shape:
            raise ValueError(
                f"{name} must have a leading batch axis; got a scalar. Arguments in batch_argnums, "
                "and all keyword arguments, have one row per example. Bind what all examples share "
                "by functools.partial."
            )
    sizes = {shape[0] for shape in named.values()}
    if len(sizes) != 1:
        listing = ", ".join(f"{name}: {shape[0]}" for name, shape in named.items()) or "no arrays"
        raise ValueError(
            f"Batch axis must have the same size for all batch arguments; got {listing}. Row i of "
            "every argument must belong to example i."
        )
    return sizes.pop()
