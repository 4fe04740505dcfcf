"""Refuses a loss or an optimizer that captured the training data.

Such a loss reads the data in the gradient of every example, and no clip bounds what one of them
changes. Such an optimizer adds to a release what has no noise. Only an unchanged column is found,
or one that is reshaped.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax.training._data import DeviceData, HostData

# That many rows are compared: enough to tell data from other arrays of this length.
_MAX_ROWS = 256


_LOSS = (
    "the loss",
    "Then the gradient of every example depends on all others, and clipping does not bound what "
    "one of them changes. Use only the example that the loss, or its augmentation, is called with.",
)
_OPTIMIZER = (
    "the optimizer",
    "Then the parameters depend on the data in a way that no noise covers. Use public numbers "
    "only, or those of a private release that you charge.",
)


def refuse_captured_data(
    constants: Iterable[Any], data: DeviceData | HostData, *, by_optimizer: bool = False
) -> None:
    """Raises if an array that the loss, or the optimizer, closes over is a column of the data.

    Args:
        constants: the arrays that the function closes over.
        data: the training data.
        by_optimizer: the function is the update, and not the loss.
    """
    name, reason = _OPTIMIZER if by_optimizer else _LOSS
    captured = [leaf for leaf in constants if _may_be_column(leaf, len(data))]
    if not captured:
        return
    indices = np.unique(np.linspace(0, len(data) - 1, _MAX_ROWS).astype(np.int64))
    if isinstance(data, HostData):
        rows = data.rows(indices)
    else:
        rows = jax.tree.map(lambda leaf: leaf[indices] if _is_readable(leaf) else None, data.arrays)
    for path, column in jax.tree_util.tree_leaves_with_path(rows):
        values = np.asarray(column).reshape(len(indices), -1)
        # Equal numbers in all rows say nothing about an example.
        if any(
            np.array_equal(np.asarray(leaf[indices]).reshape(len(indices), -1), values)
            for leaf in captured
        ) and np.any(values != values[:1]):
            raise ValueError(
                f"{name} closes over the training data: over the column "
                f"data{jax.tree_util.keystr(path)}. {reason}"
            )


def _may_be_column(leaf: Any, num_examples: int) -> bool:
    return np.ndim(leaf) > 0 and np.shape(leaf)[0] == num_examples > 1 and _is_readable(leaf)


def _is_readable(leaf: Any) -> bool:
    """Whether this process can read an array of numbers."""
    if isinstance(leaf, jax.core.Tracer):
        return False
    # The dtype of keys is no number.
    is_numeric = jnp.issubdtype(jnp.result_type(leaf), jnp.number)
    return is_numeric and getattr(leaf, "is_fully_addressable", True)
