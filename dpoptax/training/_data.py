"""Training data for `fit`, on the device or on the host, and how a batch is gathered from it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax import _validate
from dpoptax._masked_examples import unmasked
from dpoptax._pytree import PyTree
from dpoptax.per_example._validate_loss import batch_mask
from dpoptax.samplers import Batch, Sampler, take
from dpoptax.training._columns import as_columns, is_source, refuse_stream
from dpoptax.training._examples import as_example, stack_examples

# Gathers the examples of a batch from the data.
Take: TypeAlias = Callable[[PyTree, Batch], PyTree]


def take_plain(take: Take, data: PyTree, batch: Batch) -> tuple[PyTree, Batch]:
    """Returns the plain examples of a batch, and the batch without the rows that `take` masks."""
    # A `take` of the user may return plain arrays, or mask more rows than the sampler.
    examples, masks = unmasked(take(data, batch))
    return examples, Batch(batch.indices, batch_mask(examples, batch.mask, *masks))


@dataclasses.dataclass(frozen=True)
class DeviceData:
    """Data that `fit` moves to the device before the first step.

    Plain data mean the same with the default `take`.

    Attributes:
        arrays: a tree of arrays with a leading axis of num_examples; their sharding is kept. Or a
            table with named columns, such as a pandas frame, whose rows are dicts; or a list with
            one entry per example. Both are turned into arrays.
        take: `take(arrays, batch)` returns the examples of a batch, with a leading axis of
            max_batch_size: `MaskedExamples`, or plain arrays. `dpoptax.samplers.sharded_take`
            spreads them over several devices.

    Raises:
        TypeError: a column is not numeric, or the data can only be iterated over.
        ValueError: columns have different lengths, or rows different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> len(DeviceData({"x": jnp.zeros((5, 3))}))
        5
        >>> DeviceData([{"x": 1.0, "y": 0}, {"x": 2.0, "y": 1}]).arrays["x"]
        array([1., 2.])
    """

    arrays: PyTree
    take: Take = take

    def __post_init__(self) -> None:
        if is_source(self.arrays):
            raise TypeError(
                f"DeviceData needs arrays; got a {type(self.arrays).__name__}, which reads single "
                "examples. Pass HostData(source)."
            )
        object.__setattr__(self, "arrays", as_columns(self.arrays))
        _validate.leading_axis_size("data", self.arrays)

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
            data: a tree of NumPy arrays or memory maps with a leading axis of num_examples; a table
                with named columns; or an object with `len(data)` and `data[index]` for one example,
                such as a list, or a data set of PyTorch, Grain, Hugging Face or TensorFlow
                Datasets. Where it has `__getitems__(indices)`, a batch is one call.
            take: `take(rows, batch)` places the rows of one batch on the device. It is called with
                these rows only, in order; padded rows are zeros. `dpoptax.samplers.sharded_take`
                spreads them over several devices.

        Raises:
            TypeError: data is neither of these, or a column is not numeric.
            ValueError: the arrays have different lengths.
        """
        self.take = take
        if isinstance(data, bool | int | float):
            raise TypeError(
                "HostData needs a tree of arrays, or an object with len(data) and data[index]; got "
                f"{type(data).__name__}."
            )
        refuse_stream(data)
        # A list of arrays is a source of single examples, not a tree with one array per field.
        self._is_source = isinstance(data, list) or is_source(data)
        self._data = data if self._is_source else as_columns(data)
        if self._is_source:
            self._length = len(data)
        else:
            self._length = _validate.leading_axis_size("data", self._data)
        if self._length == 0:
            raise ValueError("data must have at least one example; got none.")
        # All rows must have its fields, shapes and types: a program is compiled for them.
        self._like: PyTree = as_example(self._read([0])[0]) if self._is_source else None

    def __len__(self) -> int:
        return self._length

    def rows(self, indices: np.ndarray) -> PyTree:
        """Reads examples.

        Args:
            indices: integers of shape `(count,)`.

        Returns:
            A tree of arrays with a leading axis of `count`.
        """
        if not self._is_source:
            return jax.tree.map(lambda leaf: _gather(leaf, indices), self._data)
        examples = [as_example(row) for row in self._read(indices.tolist())]
        return stack_examples(examples, like=self._like)

    def first_example(self) -> PyTree:
        """Returns the first example, with a leading axis of one."""
        return self.rows(np.zeros(1, np.int64))

    def _read(self, indices: list[int]) -> Sequence[Any]:
        if not hasattr(self._data, "__getitems__"):
            return [self._data[index] for index in indices]
        rows = self._data.__getitems__(indices)
        if not isinstance(rows, list | tuple) or len(rows) != len(indices):
            raise TypeError(
                "__getitems__ must return a list with one example per index; got "
                f"{type(rows).__name__}. Check the data source."
            )
        return rows


def as_training_data(data: PyTree | DeviceData | HostData) -> DeviceData | HostData:
    """Wraps a source of single examples in `HostData`, and other plain data in `DeviceData`."""
    if isinstance(data, DeviceData | HostData):
        return data
    return HostData(data) if is_source(data) else DeviceData(data)


def example_of_batch(data: DeviceData | HostData, sampler: Sampler) -> PyTree:
    """Returns the shapes of one example as `data.take` returns it, with a leading axis of one."""
    size = sampler.max_batch_size

    def spec(leaf: Any) -> jax.ShapeDtypeStruct:
        # Host data reach `take` as the rows of one batch.
        rows = size if isinstance(data, HostData) else leaf.shape[0]
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # reads no file
        dtype = leaf.dtype if is_key else jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), dtype)

    arrays = data.first_example() if isinstance(data, HostData) else data.arrays
    indices: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
    mask: Any = jax.ShapeDtypeStruct((size,), jnp.bool_)
    examples, _ = jax.eval_shape(
        functools.partial(take_plain, data.take), jax.tree.map(spec, arrays), Batch(indices, mask)
    )
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), examples
    )


def _gather(leaf: Any, indices: np.ndarray) -> np.ndarray:
    if isinstance(leaf, np.ndarray | jax.Array):
        return np.asarray(leaf[indices])
    # Files such as HDF5 read rows in rising order, each of them once.
    distinct, order = np.unique(indices, return_inverse=True)
    return np.asarray(leaf[distinct])[order]
