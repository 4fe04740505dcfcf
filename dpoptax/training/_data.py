"""Training data for `fit`, on the device or on the host, and how a batch is gathered from it."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import PyTree

from dpoptax import _validate
from dpoptax.samplers import Batch, take

# Gathers the examples of a batch from the data.
Take: TypeAlias = Callable[[PyTree, Batch], PyTree]


@dataclasses.dataclass(frozen=True)
class DeviceData:
    """Data that `fit` moves to the device before the first step.

    A plain tree of arrays means the same with the default `take`.

    Attributes:
        arrays: a tree of arrays with a leading axis of num_examples. Their sharding is kept.
        take: `take(arrays, batch)` returns the examples of a batch, with a leading axis of
            max_batch_size: `MaskedExamples`, or plain arrays. `dpoptax.samplers.sharded_take`
            spreads them over several devices.

    Example:
        >>> import jax.numpy as jnp
        >>> len(DeviceData({"x": jnp.zeros((5, 3))}))
        5
    """

    arrays: PyTree
    take: Take = take

    def __len__(self) -> int:
        return _validate.leading_axis_size("data", self.arrays)

    def first_example(self) -> PyTree:
        """Returns the first example, with a leading axis of one."""
        return jax.tree.map(lambda leaf: leaf[:1], self.arrays)


class HostData:
    """Data that stay on the host: arrays, memory maps, or a source of single examples.

    `fit` reads the next batches in a thread while the device computes. The numbers are those of
    the same data on the device.

    Example:
        >>> import numpy as np
        >>> HostData({"x": np.arange(5.0)}).rows(np.array([3, 1]))["x"]
        array([3., 1.])
    """

    def __init__(self, data: Any, *, take: Take = take) -> None:
        """Stores the data without reading them.

        Args:
            data: a tree of NumPy arrays or memory maps with a leading axis of num_examples; or an
                object with `len(data)` and `data[index]` for one example, such as a list, or a data
                source of Grain or TensorFlow Datasets.
            take: `take(rows, batch)` places the rows of one batch on the device. It is called with
                these rows only, in order; padded rows are zeros. `dpoptax.samplers.sharded_take`
                spreads them over several devices.

        Raises:
            TypeError: data is neither of these.
            ValueError: the arrays have different lengths.
        """
        self.take = take
        self._data = data
        leaves = jax.tree.leaves(data)
        arrays = bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)
        # A list of arrays is a source of single examples, not a tree with one array per field.
        self._is_tree = arrays and not isinstance(data, list)
        if self._is_tree:
            self._length = _validate.leading_axis_size("data", data)
        elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            self._length = len(data)
        else:
            raise TypeError(
                "HostData needs a tree of arrays, or an object with len(data) and data[index]; got "
                f"{type(data).__name__}."
            )

    def __len__(self) -> int:
        return self._length

    def rows(self, indices: np.ndarray) -> PyTree:
        """Reads examples.

        Args:
            indices: integers of shape `(count,)`.

        Returns:
            A tree of arrays with a leading axis of `count`.
        """
        if self._is_tree:
            return jax.tree.map(lambda leaf: np.asarray(leaf[indices]), self._data)
        examples = [self._data[int(index)] for index in indices]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)

    def first_example(self) -> PyTree:
        """Returns the first example, with a leading axis of one."""
        return self.rows(np.zeros(1, np.int64))


def as_training_data(data: PyTree | DeviceData | HostData) -> DeviceData | HostData:
    """Wraps a plain tree of arrays in `DeviceData`."""
    return data if isinstance(data, DeviceData | HostData) else DeviceData(data)
