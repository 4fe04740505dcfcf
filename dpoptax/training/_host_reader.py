"""Read-ahead of batches from the host.

The sampler draws each batch on the device, as it does for data on the device. A thread reads the
rows of the next batches while the device works on the current ones.
"""

import concurrent.futures
import queue
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax.samplers import Batch, MaskedExamples, Sampler
from dpoptax.samplers._take import fill_rows
from dpoptax.training._data import HostData
from dpoptax.training._program_cache import known_program

# Rows of several batches go to the device in one transfer. More bytes per transfer hide its fixed
# cost, and take more memory: two transfers are held at a time, one in use and one read ahead.
BYTES_PER_READ = 1 << 26
# Small examples would allow any number of batches. A read is also one dispatch, and the progress
# bar and Ctrl-C wait for a dispatch.
MAX_BATCHES_PER_READ = 32


class HostReader:
    """Reads the examples of the coming batches, several batches at a time."""

    def __init__(self, data: HostData, sampler: Sampler, *, max_batches: int | None = None) -> None:
        row = jax.tree.map(jnp.asarray, data.first_example())
        batch_bytes = sampler.max_batch_size * sum(leaf.nbytes for leaf in jax.tree.leaves(row))
        limit = MAX_BATCHES_PER_READ if max_batches is None else max_batches
        self.batches = max(1, min(limit, BYTES_PER_READ // max(batch_bytes, 1)))
        lead = (self.batches, sampler.max_batch_size)
        # Shapes and dtypes of what `next` returns, to compile the step before anything is read.
        self.shapes = MaskedExamples(
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape[1:]), leaf.dtype), row
            ),
            jax.ShapeDtypeStruct(lead, jnp.bool_),
        )
        self._data = data

        def sample(state: Any, _: None) -> tuple[Any, Batch]:
            return sampler.sample(state)

        # Not `self` inside: compiled functions are remembered, and must not keep the data alive.
        batches = self.batches
        self._draw: Callable[[Any], tuple[Any, Batch]] = jax.jit(
            lambda state: jax.lax.scan(sample, state, length=batches)
        )
        self._sampler_state: Any = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "dpoptax reader")
        self._pending: queue.SimpleQueue[concurrent.futures.Future[MaskedExamples]] = (
            queue.SimpleQueue()
        )

    def begin(self, sampler_state: Any) -> None:
        """Starts to read the batches that follow `sampler_state`; later calls do nothing."""
        if self._sampler_state is None:
            self._sampler_state = sampler_state
            self._draw = known_program(self._draw, sampler_state)
            self._request()

    def restart(self) -> None:
        """Forgets what was read ahead; `begin` starts again from its sampler state."""
        self._sampler_state = None
        self._pending = queue.SimpleQueue()

    def next(self) -> MaskedExamples:
        """Returns the examples of the next batches, shaped `(batches, max_batch_size, ...)`."""
        ready = self._pending.get()
        self._request()
        examples: MaskedExamples = jax.tree.map(jnp.asarray, ready.result())
        return examples

    def close(self) -> None:
        """Stops reading."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _request(self) -> None:
        # Draw in the caller's thread: JAX settings such as x64 may be local to a thread.
        self._sampler_state, batch = self._draw(self._sampler_state)
        self._pending.put(self._thread.submit(self._read, batch))

    def _read(self, batch: Batch) -> MaskedExamples:
        # The indices of gradient canaries follow those of the data. These canaries have no rows.
        mask = np.asarray(batch.mask) & (np.asarray(batch.indices) < len(self._data))
        real = np.asarray(batch.indices)[mask]
        # Padding is zeros and costs no read. A source of single examples has no shape before one
        # is read, so batches without any example read row 0.
        rows = self._data.rows(real if len(real) else np.zeros(1, np.int64))
        return MaskedExamples(
            jax.tree.map(lambda leaf: fill_rows(leaf[: len(real)], mask), rows), mask
        )
