"""Dispatch of training steps to the device: several steps per call, compiled once.

The data are on the device, or a thread streams them from the host. In both cases the step compiles
once, whatever the batches contain and however many steps a dispatch makes.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from dpoptax._jax_compat import contains_primitive
from dpoptax.samplers import Batch, Sampler, take
from dpoptax.training._data import DeviceData, HostData
from dpoptax.training._host_reader import HostReader
from dpoptax.training._multihost import from_first_process
from dpoptax.training._program_cache import known_program
from dpoptax.training._resume.fingerprint import fingerprint
from dpoptax.training._train_step import StepInfo, TrainState, TrainStep

# Target duration of one dispatch. Longer dispatches amortise the cost of a call (about 0.1 ms).
# Shorter ones let the progress bar move and Ctrl-C act soon.
SECONDS_PER_DISPATCH = 0.5
# Host data are read in parts of this many rows when they are hashed, to bound the memory.
ROWS_PER_HASH = 1024

_Advanced = tuple[TrainState, StepInfo | None]


@runtime_checkable
class Stepper(Protocol):
    """Runs training steps on the device."""

    steps_per_dispatch: int | None
    """How many steps a dispatch makes, except the last one; None if any number will do."""

    def advance(self, state: TrainState, num_steps: int) -> _Advanced:
        """Runs the steps and waits for them; returns diagnostics of the last one if wanted."""

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
    max_batches: int | None = None,
) -> Stepper:
    """Returns the stepper for these data; `make_step(take=take)` returns the train step.

    `max_batches` limits how many batches are read from the host at a time.
    """
    if isinstance(data, HostData):
        reader = HostReader(data, sampler, max_batches=max_batches)
        return HostStream(make_step, data, reader, diagnostics=diagnostics)
    return DeviceLoop(make_step, data, diagnostics=diagnostics)


class DeviceLoop:
    """Steps over data that are on the device."""

    steps_per_dispatch: int | None = None

    def __init__(
        self, make_step: Callable[..., TrainStep], data: DeviceData, *, diagnostics: bool
    ) -> None:
        self._data = jax.tree.map(jnp.asarray, data.arrays)
        self._steps = _Steps(make_step(take=data.take), lambda data, index: data, diagnostics)

    def advance(self, state: TrainState, num_steps: int) -> _Advanced:
        """See `Stepper.advance`."""
        return self._steps.run(state, self._data, num_steps)

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
        *,
        diagnostics: bool,
    ) -> None:
        place = data.take

        def take_rows(rows: PyTree, batch: Batch) -> PyTree:
            """The rows of this batch were read in order, so only their placement remains."""
            order = jnp.arange(len(batch.mask), dtype=jnp.int32)
            all_rows = Batch(order, jnp.ones(len(batch.mask), bool))
            return rows if place is take else place(rows, all_rows)

        self._data = data
        self._reader = reader
        self.steps_per_dispatch: int | None = self._reader.batches
        self._steps = _Steps(
            make_step(take=take_rows),
            lambda rows, index: jax.tree.map(lambda leaf: leaf[index], rows),
            diagnostics,
        )

    def advance(self, state: TrainState, num_steps: int) -> _Advanced:
        """See `Stepper.advance`."""
        # Not before the first step: a resumed run may have got new keys since it was restored, and
        # rows read with the old keys belong to other people than those that are accounted.
        self._reader.begin(state.sampler_state)
        try:
            return self._steps.run(state, self._reader.next(), num_steps)
        except BaseException:
            # The next try makes the same steps, so it must get the same rows.
            self._reader.restart()
            raise

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

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._size = fixed or 1

    def next(self, remaining: int) -> int:
        """Returns the number of steps, the same in every process, at most `remaining`."""
        self._size = min(from_first_process(self._size), remaining)
        return self._size

    def adapt(self, seconds: float, seconds_left: float) -> None:
        """Adapts to how long the last dispatch took, and to the time until the limit."""
        if self._fixed is None:
            target = min(SECONDS_PER_DISPATCH, max(seconds_left, 0.0))
            fitting = int(self._size * target / max(seconds, 1e-6))
            # At most double: the first dispatch is short or includes compilation, so its time
            # predicts little.
            self._size = max(1, min(2 * self._size, fitting))


class _Steps:
    """One train step, compiled alone and inside a loop over several steps."""

    def __init__(
        self, step: TrainStep, data_of: Callable[[PyTree, Any], PyTree], diagnostics: bool
    ) -> None:
        # `data_of(data, index)` returns the data for step number `index` of a dispatch.
        def one(state: TrainState, data: PyTree, index: Int[Array, ""]) -> _Advanced:
            state, info = step(state, data_of(data, index))
            return state, info if diagnostics else None

        self._one = jax.jit(one)

        def several(state: TrainState, data: PyTree, num_steps: Int[Array, ""]) -> _Advanced:
            shapes = jax.eval_shape(one, state, data, num_steps)[1]
            no_info = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), shapes)
            return jax.lax.fori_loop(
                0,
                num_steps,
                lambda index, advanced: self._one(advanced[0], data, index),
                (state, no_info),
            )

        self._several = jax.jit(several)
        self._loops: bool | None = None
        self._known: Callable[..., _Advanced] | None = None

    def run(self, state: TrainState, data: PyTree, num_steps: int) -> _Advanced:
        """Runs the steps and waits for them."""
        info = None
        if self._known is None:
            self._loops = self._is_fast_in_loop(state, data)
            chosen = self._several if self._loops else self._one
            self._known = known_program(chosen, state, data, jnp.asarray(0))
        if self._loops:
            state, info = self._known(state, data, jnp.asarray(num_steps))
        else:
            for index in range(num_steps):
                state, info = self._known(state, data, jnp.asarray(index))
        return jax.block_until_ready((state, info))

    def program(self, state: TrainState, data: PyTree) -> str:
        """Returns the lowered program of one step."""
        return self._one.lower(state, data, jnp.asarray(0)).as_text()

    def _is_fast_in_loop(self, state: TrainState, data: PyTree) -> bool:
        # XLA on a CPU uses slow convolutions inside loops, up to eight times slower than outside.
        # A step with a convolution is long enough to be its own dispatch.
        if jax.default_backend() != "cpu":
            return True
        jaxpr = self._one.trace(state, data, jnp.asarray(0)).jaxpr
        return not contains_primitive(jaxpr, jax.lax.conv_general_dilated_p)
