"""Arguments of a model: which are data, and in which form."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpoptax import _validate
from dpoptax._masked_examples import MaskedExamples, unmasked
from dpoptax._pytree import PyTree
from dpoptax.training._columns import as_columns


def split_keywords(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], num_examples: int
) -> tuple[tuple[Any, ...], tuple[str, ...], dict[str, Any]]:
    """Returns all data, the names of those passed by keyword, and the other arguments.

    An array is data if its leading axis is as long as that of the positional arguments.
    """
    args = tuple(columns(f"args[{i}]", arg) for i, arg in enumerate(args))
    length = _validate.leading_axis_size("args", args) if jax.tree.leaves(args) else num_examples
    names = tuple(
        name
        for name, value in kwargs.items()
        if not isinstance(value, str | bytes)
        and not _validate.is_key(value)
        and np.ndim(value) > 0
        and np.shape(value)[0] == length
    )
    data = (*args, *(columns(name, kwargs[name]) for name in names))
    others = {name: value for name, value in kwargs.items() if name not in names}
    _validate.leading_axis_size("args", data)
    return data, names, others


def columns(name: str, arg: Any) -> Any:
    """Returns an argument as arrays; refuses what is no number, without showing a value."""
    if hasattr(arg, "columns") and hasattr(arg, "to_numpy"):
        raise TypeError(
            f"{name} is a table of type {type(arg).__name__}, but a NumPyro model takes arrays. "
            f"Pass {name}.to_numpy(), or one array for each column."
        )
    return as_columns(arg, name)


def plain(data: tuple[Any, dict[str, Any]]) -> tuple[tuple[Any, dict[str, Any]], list[Array]]:
    """Returns the arguments of a batch without their masks, and the masks."""
    args, kwargs = data
    if len(args) == 1 and isinstance(args[0], MaskedExamples):
        several = isinstance(args[0].examples, tuple | list)
        args = tuple(args[0]) if several else args
    without, masks = unmasked((args, kwargs))
    return without, masks


def real_rows(data: PyTree, masks: list[Array]) -> PyTree:
    """Returns the rows that belong to examples, where the masks are known."""
    if not masks or any(isinstance(mask, jax.core.Tracer) for mask in masks):
        return data
    rows = np.flatnonzero(np.all([np.asarray(mask) for mask in masks], axis=0))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], data)
