"""A train step and data in, several steps per dispatch to the device out.

Data either lie on the device, or stream from the host a few batches at a time. Both compile once,
whatever the batches drawn and however many steps a dispatch makes.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from dpoptax.samplers import Batch, Sampler, take
from dpoptax.training.step import Take, TrainState, TrainStep
from dpoptax.training.streaming import Reader, Streamed

# How many examples of a source are looked at to tell it from another.
LOOKED_AT = 64


class Engine(Protocol):
    """What makes the steps."""

    def advance(self, state: TrainState, num_steps: int) -> TrainState:
        """Makes so many steps, and waits for them."""

    def most(self) -> int | None:
        """The steps that a dispatch makes unless the run ends before, or None for any number."""

    def digest(self, state: TrainState) -> str:
        """Returns a digest of what a step computes: the program, its data, the devices."""

    def close(self) -> None:
        """Stops what runs beside the device."""


class Resident:
    """Data on the device."""

    def __init__(self, make_step: Callable[[Take], TrainStep], data: PyTree, gather: Take) -> None:
        """Moves the data to the device, where they are not there yet.

        Args:
            make_step: of what takes the examples of a batch.
            data: a tree of arrays.
            gather: takes them.
        """
        step = make_step(gather)
        self._data = jax.tree.map(jnp.asarray, data)

        def run(state: TrainState, data: PyTree, num_steps: Int[Array, ""]) -> TrainState:
            return jax.lax.fori_loop(0, num_steps, lambda _, state: step(state, data)[0], state)

        self._run = jax.jit(run)

    def advance(self, state: TrainState, num_steps: int) -> TrainState:
        """See `Engine.advance`."""
        return jax.block_until_ready(self._run(state, self._data, jnp.asarray(num_steps)))

    def most(self) -> int | None:
        """See `Engine.most`."""
        return None

    def digest(self, state: TrainState) -> str:
        """See `Engine.digest`."""
        program = self._run.lower(state, self._data, jnp.asarray(1)).as_text()
        return _digest(program, self._data)

    def close(self) -> None:
        """See `Engine.close`."""


class FromHost:
    """Data on the host."""

    def __init__(
        self,
        make_step: Callable[[Take], TrainStep],
        data: Streamed,
        gather: Take,
        *,
        sampler: Sampler,
        state: TrainState,
    ) -> None:
        """Begins to read.

        Args:
            make_step: as in `Resident`.
            data: on the host.
            gather: places what was read; it is asked for all rows of it in their order.
            sampler: who takes part.
            state: before the first step.
        """

        def all_rows(rows: PyTree, batch: Batch) -> PyTree:
            """The rows that were read are those of this batch, padding included."""
            order = jnp.arange(len(batch.mask), dtype=jnp.int32)
            everyone = Batch(order, jnp.ones(len(batch.mask), bool))
            return rows if gather is take else gather(rows, everyone)

        step = make_step(all_rows)
        self._data = data
        self._reader = Reader(data, sampler, state.sampler_state)

        def run(state: TrainState, rows: PyTree, num_steps: Int[Array, ""]) -> TrainState:
            def one(index: Int[Array, ""], state: TrainState) -> TrainState:
                return step(state, jax.tree.map(lambda leaf: leaf[index], rows))[0]

            return jax.lax.fori_loop(0, num_steps, one, state)

        self._run = jax.jit(run)

    def advance(self, state: TrainState, num_steps: int) -> TrainState:
        """See `Engine.advance`."""
        rows = self._reader.next()
        return jax.block_until_ready(self._run(state, rows, jnp.asarray(num_steps)))

    def most(self) -> int | None:
        """See `Engine.most`."""
        return self._reader.batches

    def digest(self, state: TrainState) -> str:
        """See `Engine.digest`."""
        program = self._run.lower(state, self._reader.like(), jnp.asarray(1)).as_text()
        chosen = np.linspace(0, len(self._data) - 1, LOOKED_AT).astype(np.int64)
        return _digest(f"{len(self._data)} {program}", self._data.rows(chosen))

    def close(self) -> None:
        """See `Engine.close`."""
        self._reader.close()


def _digest(program: str, data: Any) -> str:
    digest = hashlib.sha256()
    devices = [f"{device.platform} {device.device_kind}" for device in jax.devices()]
    for text in (program, jax.__version__, *devices):
        digest.update(text.encode())
    for leaf in jax.tree.leaves(data):
        whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if whole and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
