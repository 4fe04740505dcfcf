"""Data on the host in, the examples of several batches on the device out, read ahead of time.

Who takes part is drawn on the device, as ever; a thread reads the rows of the next batches while
the device works on these. The numbers are those of data that lie on the device.
"""

import concurrent.futures
import queue
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dpoptax import _validate
from dpoptax.samplers import Batch, Sampler

# Several batches go to the device at once, of so many bytes together.
BYTES_AT_ONCE = 1 << 26
MOST_BATCHES = 32


class HostData:
    """Data that stay on the host, for `fit`: arrays, memory maps, or a source of single examples.

    Example:
        >>> import numpy as np
        >>> HostData({"x": np.arange(5.0)}).rows(np.array([3, 1]))["x"]
        array([3., 1.])
    """

    def __init__(self, data: Any) -> None:
        """Takes the data; nothing is read yet.

        Args:
            data: a tree of numpy arrays or memory maps with a leading axis of num_examples; or an
                object with `len(data)` and `data[index]` for one example, such as a list, or a data
                source of Grain or TensorFlow Datasets.

        Raises:
            TypeError: neither.
            ValueError: arrays of different lengths.
        """
        leaves = jax.tree.leaves(data)
        self._data = data
        shaped = bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)
        self._by_rows = shaped and not isinstance(data, list)
        if self._by_rows:
            self._length = _validate.leading_axis_size("data", data)
        elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            self._length = len(data)
        else:
            raise TypeError(
                "data to stream must be a tree of arrays, or have len(data) and data[index]; got "
                f"{type(data).__name__}."
            )

    def __len__(self) -> int:
        return self._length

    def rows(self, indices: np.ndarray) -> PyTree:
        """Reads examples.

        Args:
            indices: int `(count,)`.

        Returns:
            A tree of arrays with a leading axis of `count`.
        """
        if self._by_rows:
            return jax.tree.map(lambda leaf: np.asarray(leaf[indices]), self._data)
        examples = [self._data[int(index)] for index in indices]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)


class Reader:
    """Gives the examples of the batches to come, several batches at a time."""

    def __init__(self, data: HostData, sampler: Sampler) -> None:
        """Looks at one example; nothing is drawn yet.

        Args:
            data: on the host.
            sampler: who takes part.
        """
        assert sampler.max_batch_size is not None
        row = jax.tree.map(jnp.asarray, example_of(data))
        size = sampler.max_batch_size * sum(leaf.nbytes for leaf in jax.tree.leaves(row))
        self.batches = max(1, min(MOST_BATCHES, BYTES_AT_ONCE // max(size, 1)))
        lead = (self.batches, sampler.max_batch_size)
        # Shapes and types of what `next` returns.
        self.like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape[1:]), leaf.dtype), row
        )
        self._data = data

        def sample(state: Any, _: None) -> tuple[Any, Batch]:
            return sampler.sample(state)

        self._draw: Callable[[Any], tuple[Any, Batch]] = jax.jit(
            lambda state: jax.lax.scan(sample, state, length=self.batches)
        )
        self._state: Any = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "dpoptax reader")
        self._ahead: queue.SimpleQueue[concurrent.futures.Future[PyTree]] = queue.SimpleQueue()

    def begin(self, sampler_state: Any) -> None:
        """Begins to read, unless it did.

        Args:
            sampler_state: before the first batch.
        """
        if self._state is None:
            self._state = sampler_state
            self._ask()

    def next(self) -> PyTree:
        """Returns examples of the next `batches` batches, `(batches, max_batch_size, ...)`."""
        ready = self._ahead.get()
        self._ask()
        return jax.tree.map(jnp.asarray, ready.result())

    def close(self) -> None:
        """Stops reading."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ask(self) -> None:
        # Drawn in the caller's thread: settings of JAX may be those of a thread.
        self._state, batch = self._draw(self._state)
        self._ahead.put(self._thread.submit(self._read, batch))

    def _read(self, batch: Batch) -> PyTree:
        indices = np.where(np.asarray(batch.mask), np.asarray(batch.indices), 0)
        rows = self._data.rows(indices.reshape(-1))
        return jax.tree.map(lambda leaf: leaf.reshape(*indices.shape, *leaf.shape[1:]), rows)


def example_of(data: Any) -> PyTree:
    """Returns one example with a leading axis of one, to check a loss against.

    Args:
        data: a tree of arrays, or `HostData`.

    Returns:
        A tree of arrays.
    """
    if isinstance(data, HostData):
        return data.rows(np.zeros(1, np.int64))
    return jax.tree.map(lambda leaf: leaf[:1], data)
