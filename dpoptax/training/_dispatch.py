"""A train step and data in, several steps per dispatch to the device out.

Data either lie on the device, or stream from the host a few batches at a time. Both compile once,
whatever the batches drawn and however many steps a dispatch makes.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from dpoptax import _validate
from dpoptax.samplers import Batch, Sampler, take
from dpoptax.training._host_data import HostData, Reader
from dpoptax.training._multihost import of_all, of_first
from dpoptax.training._train_step import StepInfo, Take, TrainState, TrainStep

_Made = tuple[TrainState, StepInfo | None]
# So many examples of streamed data are read at a time for their digest.
ROWS_AT_ONCE = 1024
# The flag of XLA under which a GPU gives the same bits again.
DETERMINISTIC = "--xla_gpu_deterministic_ops"


class Engine(Protocol):
    """What makes the steps."""

    def advance(self, state: TrainState, num_steps: int) -> _Made:
        """Makes so many steps, and waits for them; gives readings of the last if asked for."""

    def most(self) -> int | None:
        """The steps that a dispatch makes unless the run ends before, or None for any number."""

    def digest(self, state: TrainState) -> str:
        """Returns a digest of what a step computes: the program, its data, the devices."""

    def close(self) -> None:
        """Stops what runs beside the device."""


class Resident:
    """Data on the device."""

    def __init__(
        self,
        make_step: Callable[[Take], TrainStep],
        data: PyTree,
        gather: Take,
        *,
        informs: bool = False,
    ) -> None:
        """Moves the data to the device, where they are not there yet.

        Args:
            make_step: of what takes the examples of a batch.
            data: a tree of arrays.
            gather: takes them.
            informs: whether to give readings.
        """
        self._data = jax.tree.map(jnp.asarray, data)
        self._steps = _Steps(make_step(gather), lambda data, index: data, informs)

    def advance(self, state: TrainState, num_steps: int) -> _Made:
        """See `Engine.advance`."""
        return self._steps.run(state, self._data, num_steps)

    def most(self) -> int | None:
        """See `Engine.most`."""
        return None

    def digest(self, state: TrainState) -> str:
        """See `Engine.digest`."""
        return _digest(self._steps.text(state, self._data), [self._data])

    def close(self) -> None:
        """See `Engine.close`."""


class FromHost:
    """Data on the host."""

    def __init__(
        self,
        make_step: Callable[[Take], TrainStep],
        data: HostData,
        gather: Take,
        *,
        sampler: Sampler,
        informs: bool = False,
    ) -> None:
        """Takes the data; reading begins with the first step.

        Args:
            make_step: as in `Resident`.
            data: on the host.
            gather: places what was read; it is asked for all rows of it in their order.
            sampler: who takes part.
            informs: as in `Resident`.
        """

        def all_rows(rows: PyTree, batch: Batch) -> PyTree:
            """The rows that were read are those of this batch, padding included."""
            order = jnp.arange(len(batch.mask), dtype=jnp.int32)
            everyone = Batch(order, jnp.ones(len(batch.mask), bool))
            return rows if gather is take else gather(rows, everyone)

        self._data = data
        self._reader = Reader(data, sampler)
        self._steps = _Steps(
            make_step(all_rows),
            lambda rows, index: jax.tree.map(lambda leaf: leaf[index], rows),
            informs,
        )

    def advance(self, state: TrainState, num_steps: int) -> _Made:
        """See `Engine.advance`."""
        # From here on, for a run that is taken up may have been given other keys before.
        self._reader.begin(state.sampler_state)
        return self._steps.run(state, self._reader.next(), num_steps)

    def most(self) -> int | None:
        """See `Engine.most`."""
        return self._reader.batches

    def digest(self, state: TrainState) -> str:
        """See `Engine.digest`."""
        # All of it: data that differ in one example must not meet the same noise.
        everyone = np.arange(len(self._data))
        parts = (
            self._data.rows(everyone[first : first + ROWS_AT_ONCE])
            for first in range(0, len(everyone), ROWS_AT_ONCE)
        )
        return _digest(self._steps.text(state, self._reader.like), parts)

    def close(self) -> None:
        """See `Engine.close`."""
        self._reader.close()


class _Steps:
    """Several steps: a loop on the device, unless the device is slow at loops."""

    def __init__(
        self, step: TrainStep, data_of: Callable[[PyTree, Any], PyTree], informs: bool
    ) -> None:
        """`data_of(data, index)` is what step number `index` of a dispatch takes for data."""

        def one(state: TrainState, data: PyTree, index: Int[Array, ""]) -> _Made:
            state, info = step(state, data_of(data, index))
            return state, info if informs else None

        self._one = jax.jit(one)

        def several(state: TrainState, data: PyTree, num_steps: Int[Array, ""]) -> _Made:
            shapes = jax.eval_shape(one, state, data, num_steps)[1]
            nothing = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), shapes)
            return jax.lax.fori_loop(
                0, num_steps, lambda index, made: self._one(made[0], data, index), (state, nothing)
            )

        self._several = jax.jit(several)
        self._loops: bool | None = None

    def run(self, state: TrainState, data: PyTree, num_steps: int) -> _Made:
        """Makes so many steps, and waits for them."""
        info = None
        if self._loops is None:
            self._loops = self._in_loops(state, data)
        if self._loops:
            state, info = self._several(state, data, jnp.asarray(num_steps))
        else:
            for index in range(num_steps):
                state, info = self._one(state, data, jnp.asarray(index))
        return jax.block_until_ready((state, info))

    def text(self, state: TrainState, data: PyTree) -> str:
        """Returns the program of a step."""
        return self._one.lower(state, data, jnp.asarray(0)).as_text()

    def _in_loops(self, state: TrainState, data: PyTree) -> bool:
        # XLA has fast convolutions for CPUs, but not within loops: there they take up to eight
        # times as long, and a step with one is long enough for a dispatch of its own.
        if jax.default_backend() != "cpu":
            return True
        jaxpr = self._one.trace(state, data, jnp.asarray(0)).jaxpr
        return "conv_general_dilated" not in str(jaxpr)


def _digest(program: str, parts: Iterable[PyTree]) -> str:
    """A digest of all that decides what a step computes, but for the state."""
    digest = hashlib.sha256()
    devices = [f"{device.platform} {device.device_kind}" for device in jax.devices()]
    flags = os.environ.get("XLA_FLAGS", "")
    versions = (jax.__version__, importlib.metadata.version("jaxlib"), platform.platform(), flags)
    for text in (program, *versions, *devices, _processor()):
        digest.update(text.encode())
    if not _repeats(program, jax.default_backend(), flags):
        digest.update(str(of_first(secrets.randbits(31))).encode())
    for part in parts:
        for leaf in jax.tree.leaves(part):
            for array in _arrays(leaf):
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return of_all(digest.hexdigest())


def _repeats(program: str, backend: str, flags: str) -> bool:
    """Whether a program gives the same bits again on the same machine."""
    # What a callback calls is not in the program, nor are constants under this setting; and a GPU
    # adds up in the order of the moment.
    hidden = getattr(jax.config, "jax_use_simplified_jaxpr_constants", False)
    chosen = [flag for flag in flags.split() if flag.startswith(f"{DETERMINISTIC}=")]
    repeatable = backend != "gpu" or chosen[-1:] in (
        [f"{DETERMINISTIC}=true"],
        [f"{DETERMINISTIC}=1"],
    )
    return "callback" not in program and not hidden and repeatable


def _processor() -> str:
    """What decides how a CPU rounds sums: its kind, its instructions, and between how many."""
    known = pathlib.Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    kinds = ("model name", "flags", "Features")  # the last is ARM's
    told = {line for line in lines if line.startswith(kinds)}
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        count = os.cpu_count() or 0
    return repr((sorted(told), platform.processor(), count, os.environ.get("NPROC")))


def _arrays(leaf: Any) -> Iterator[np.ndarray]:
    """What of a leaf lies with this process."""
    if _validate.is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        yield from (np.asarray(shard.data) for shard in leaf.addressable_shards)
    else:
        yield np.asarray(leaf)
