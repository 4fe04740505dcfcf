"""Dispatch of training steps to the device: several steps per call, compiled once.

The data are on the device, or a thread streams them from the host. In both cases the step compiles
once, whatever the batches contain and however many steps a dispatch makes.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dpoptax._pytree import PyTree
from dpoptax.per_example._primitives.fast_convolution import has_slow_convolutions
from dpoptax.samplers import Batch, MaskedExamples, Sampler
from dpoptax.samplers._base import padded_batch
from dpoptax.training._data import DeviceData, HostData
from dpoptax.training._host_reader import HostReader
from dpoptax.training._multihost import from_first_process
from dpoptax.training._program_cache import known_program
from dpoptax.training._resume.fingerprint import fingerprint
from dpoptax.training._train_step import TrainState, TrainStep

# Target duration of one dispatch. Longer dispatches amortise the cost of a call (about 0.1 ms).
# Shorter ones let the progress bar move and Ctrl-C act soon.
SECONDS_PER_DISPATCH = 0.5
# Host data are read in parts of this many rows when they are hashed, to bound the memory.
ROWS_PER_HASH = 1024

# What the step returns beside its state: a StepInfo, or what `PrivateRun` hands to the user.
_Advanced = tuple[TrainState, Any]
# The same, and how many examples were not finite, of how many.
_Counted = tuple[TrainState, Any, Any]


@runtime_checkable
class Stepper(Protocol):
    """Runs training steps on the device."""

    @property
    def steps_per_dispatch(self) -> int | None:
        """The most steps that the next dispatch can make; None if any number will do."""

    def advance(self, state: TrainState, num_steps: int) -> _Advanced:
        """Runs the steps and waits for them; returns diagnostics of the last one if wanted."""

    def nonprivate_nonfinite(self) -> tuple[int, int] | None:
        """Returns how many drawn examples were not finite, and of how many; None if not counted."""

    def fingerprint(self, state: TrainState) -> str:
        """Returns a digest of all that decides what a step computes, except the state."""

    def close(self) -> None:
        """Stops background work."""


def make_stepper(
    make_step: Callable[..., TrainStep],
    data: DeviceData | HostData,
    *,
    sampler: Sampler,
    diagnostics: bool,
    count_nonfinite: bool = True,
    max_batches: int | None = None,
) -> Stepper:
    """Returns the stepper for these data; `make_step(take=take)` returns the train step.

    With `count_nonfinite` it counts examples whose loss is not finite. `max_batches` limits how
    many batches are read from the host at a time.
    """
    readings = {"diagnostics": diagnostics, "count_nonfinite": count_nonfinite}
    if isinstance(data, HostData):
        reader = HostReader(data, sampler, max_batches=max_batches)
        return HostStream(make_step, data, reader, **readings)
    return DeviceLoop(make_step, data, **readings)


class DeviceLoop:
    """Steps over data that are on the device."""

    steps_per_dispatch: int | None = None

    def __init__(
        self, make_step: Callable[..., TrainStep], data: DeviceData, **readings: bool
    ) -> None:
        self._data = jax.tree.map(jnp.asarray, data.arrays)
        self._steps = _Steps(make_step(take=data.take), lambda data, index: data, **readings)

    def advance(self, state: TrainState, num_steps: int) -> _Advanced:
        """See `Stepper.advance`."""
        return self._steps.run(state, self._data, num_steps)

    def nonprivate_nonfinite(self) -> tuple[int, int] | None:
        """See `Stepper.nonprivate_nonfinite`."""
        return self._steps.nonfinite

    def fingerprint(self, state: TrainState) -> str:
        """See `Stepper.fingerprint`."""
        return fingerprint(self._steps.program(state, self._data), [self._data])

    def close(self) -> None:
        """See `Stepper.close`."""


class HostStream:
    """Steps over data that are streamed from the host."""

    def __init__(
        self,
        make_step: Callable[..., TrainStep],
        data: HostData,
        reader: HostReader,
        **readings: bool,
    ) -> None:
        # Not `data` itself: a program that is remembered would keep the data alive.
        place = data.take

        def take_rows(rows: MaskedExamples, batch: Batch) -> PyTree:
            """The rows of this batch were read in order, so only their placement remains."""
            # The default `take` too: the numbers are then those of data on the device, to the bit.
            order = jnp.arange(len(batch.mask), dtype=jnp.int32)
            return place(rows.examples, padded_batch(order, rows.mask, len(batch.mask)))

        # A step reads here how many devices share a batch.
        take_rows.sharding = getattr(place, "sharding", None)  # type: ignore[attr-defined]
        self._data = data
        self._reader = reader
        # The batches of the last read, and how many of them were not used yet.
        self._rows: PyTree = None
        self._unused = 0
        # The step that the coming rows are for; None if they are for no step.
        self._next_step: int | None = None
        self._steps = _Steps(
            make_step(take=take_rows),
            lambda rows, index: jax.tree.map(lambda leaf: leaf[index], rows),
            **readings,
        )

    @property
    def steps_per_dispatch(self) -> int | None:
        """See `Stepper.steps_per_dispatch`: the batches that are left of a read."""
        return self._unused or self._reader.batches

    def advance(self, state: TrainState, num_steps: int) -> _Advanced:
        """See `Stepper.advance`."""
        # Not before the first step: a resumed run may have got new keys since it was restored, and
        # rows read with the old keys belong to other people than those that are accounted.
        step = int(state.step)
        if step != self._next_step:
            # The rows at hand are of other steps: a call before failed, or its result was not kept.
            self._reader.restart()
            self._unused = 0
        self._next_step = None
        self._reader.begin(state.sampler_state)
        if not self._unused:
            self._rows, self._unused = self._reader.next(), self._reader.batches
        first = self._reader.batches - self._unused
        self._unused -= num_steps
        advanced = self._steps.run(state, self._rows, num_steps, first)
        self._next_step = step + num_steps
        return advanced

    def nonprivate_nonfinite(self) -> tuple[int, int] | None:
        """See `Stepper.nonprivate_nonfinite`."""
        return self._steps.nonfinite

    def fingerprint(self, state: TrainState) -> str:
        """See `Stepper.fingerprint`."""
        # Hash every row: two data sets that differ in one example must not get the same noise.
        rows = np.arange(len(self._data))
        parts = (
            self._data.rows(rows[first : first + ROWS_PER_HASH])
            for first in range(0, len(rows), ROWS_PER_HASH)
        )
        return fingerprint(self._steps.program(state, self._reader.shapes), parts)

    def close(self) -> None:
        """See `Stepper.close`."""
        self._reader.close()


class DispatchSize:
    """Chooses how many steps the next dispatch makes: about `SECONDS_PER_DISPATCH` of them."""

    def __init__(self) -> None:
        self._size = 1
        self._last = 1

    def next(self, limit: int, steps_per_dispatch: int | None) -> int:
        """Returns the number of steps, the same in every process, at most `limit`."""
        self._last = min(steps_per_dispatch or from_first_process(self._size), limit)
        return self._last

    def adapt(self, seconds: float, seconds_left: float) -> None:
        """Adapts to how long the last dispatch took, and to the time until the limit."""
        target = min(SECONDS_PER_DISPATCH, max(seconds_left, 0.0))
        fitting = int(self._last * target / max(seconds, 1e-6))
        # At most double: the first dispatch is short or includes compilation, so its time predicts
        # little.
        self._size = max(1, min(2 * self._size, fitting))


class _Steps:
    """One train step, compiled alone and inside a loop over several steps."""

    def __init__(
        self,
        step: TrainStep,
        data_of: Callable[[PyTree, Any], PyTree],
        *,
        diagnostics: bool,
        count_nonfinite: bool,
    ) -> None:
        # `data_of(data, index)` returns the data for step number `index` of a read.
        def one(state: TrainState, data: PyTree, index: Int[Array, ""]) -> _Counted:
            state, info = step(state, data_of(data, index))
            counts = None
            if count_nonfinite:
                counts = info.nonprivate_nonfinite_count, info.nonprivate_batch_size
            return state, info if diagnostics else None, counts

        self._one = jax.jit(one)

        def several(
            state: TrainState, data: PyTree, first: Int[Array, ""], num_steps: Int[Array, ""]
        ) -> _Counted:
            def body(index: Int[Array, ""], counted: _Counted) -> _Counted:
                state, info, counts = self._one(counted[0], data, index)
                return state, info, jax.tree.map(jnp.add, counted[2], counts)

            _, *shapes = jax.eval_shape(one, state, data, num_steps)
            nothing = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), shapes)
            return jax.lax.fori_loop(first, first + num_steps, body, (state, *nothing))

        self._several = jax.jit(several)
        self._loops: bool | None = None
        self._known: Callable[..., _Counted] | None = None
        # Examples that were not finite, and all that were drawn.
        self.nonfinite: tuple[int, int] | None = (0, 0) if count_nonfinite else None

    def run(self, state: TrainState, data: PyTree, num_steps: int, first: int = 0) -> _Advanced:
        """Runs the steps of a read from number `first` on, and waits for them."""
        info = None
        if self._known is None:
            self._loops = self._is_fast_in_loop(state, data)
            zero = jnp.asarray(0)
            self._known = (
                known_program(self._several, state, data, zero, zero)
                if self._loops
                else known_program(self._one, state, data, zero)
            )
        if self._loops:
            state, info, counts = self._known(
                state, data, jnp.asarray(first), jnp.asarray(num_steps)
            )
            self._count([counts])
        else:
            counted = []
            for index in range(first, first + num_steps):
                state, info, counts = self._known(state, data, jnp.asarray(index))
                counted.append(counts)
            self._count(counted)
        return jax.block_until_ready((state, info))

    def _count(self, counted: list[Any]) -> None:
        if self.nonfinite is not None:
            rows = np.asarray(counted, np.int64).reshape(-1, 2)
            self.nonfinite = tuple((rows.sum(axis=0) + self.nonfinite).tolist())

    def program(self, state: TrainState, data: PyTree) -> str:
        """Returns the lowered program of one step."""
        return self._one.lower(state, data, jnp.asarray(0)).as_text()

    def _is_fast_in_loop(self, state: TrainState, data: PyTree) -> bool:
        # A step with a slow convolution is long enough to be its own dispatch.
        if jax.default_backend() != "cpu":
            return True
        return not has_slow_convolutions(self._one.trace(state, data, jnp.asarray(0)).jaxpr)
