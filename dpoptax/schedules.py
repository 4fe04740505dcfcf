"""Schedules: numbers that change with the step, by values known before the run.

A schedule fixed before the run can be accounted step by step. A value that depends on earlier
releases cannot: use `dpoptax.accounting.RdpFilter` for that.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dpoptax import _validate

__all__ = ["ScalarOrSchedule", "Schedule", "as_schedule", "tabulate"]

# More distinct values than this are rounded down to so many levels before they are accounted.
MOST_LEVELS = 50


def _values(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(map(_value, values))


def _value(value: float) -> float:
    # An infinite value is a clip bound that does not clip.
    real = _validate.real("values", value)
    return real if real == math.inf else _validate.non_negative("values", real)


def _lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    return tuple(_validate.count("lengths", length) for length in lengths)


@attrs.frozen
class Schedule:
    """A piecewise-constant schedule: each value holds for a number of steps, the last forever.

    A schedule is also an Optax schedule: call it with a step, traced or not. A schedule with one
    value is a constant.

    Attributes:
        values: one value per piece, zero or more.
        lengths: how many steps each piece lasts, at least 1.

    Raises:
        TypeError: a value is not a number, or a length is not a whole number.
        ValueError: a value is negative, or the number of values and lengths differ or is zero.

    Example:
        >>> noise_multiplier = Schedule(values=(1.5, 1.0), lengths=(100, 900))
        >>> [float(noise_multiplier(step)) for step in (0, 99, 100, 5000)]
        [1.5, 1.5, 1.0, 1.0]
        >>> noise_multiplier.min, noise_multiplier.max
        (1.0, 1.5)
    """

    values: tuple[float, ...] = attrs.field(converter=_values)
    lengths: tuple[int, ...] = attrs.field(converter=_lengths)

    def __attrs_post_init__(self) -> None:
        if not self.values or len(self.values) != len(self.lengths):
            raise ValueError(
                "values and lengths must have the same number of entries, at least one; got "
                f"{len(self.values)} values and {len(self.lengths)} lengths."
            )

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns the value at `step`, as float32."""
        ends = np.minimum(np.cumsum(self.lengths), np.iinfo(np.int32).max)[:-1]
        piece = jnp.searchsorted(jnp.asarray(ends, jnp.int32), jnp.asarray(step), side="right")
        return jnp.asarray(self.values, jnp.float32)[piece]

    def at(self, step: Int[Array, ""] | int) -> float | Float[Array, ""]:
        """Returns the value at `step`: a Python float for a constant, else a float32 scalar."""
        return self.values[0] if len(self.values) == 1 else self(step)

    @property
    def min(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def max(self) -> float:
        """The largest value."""
        return max(self.values)

    def slice(self, start: int, stop: int) -> "Schedule":
        """Returns the schedule of the steps from `start` up to `stop`, counted from `start`."""
        if len(self.values) == 1:
            return self
        pieces = [(value, last - max(first, start)) for value, first, last in self.pieces(stop)]
        values, lengths = zip(*(piece for piece in pieces if piece[1] > 0), strict=True)
        return Schedule(values, lengths)

    def pieces(self, num_steps: int) -> Iterator[tuple[float, int, int]]:
        """Yields value, first step and end of every piece that begins before `num_steps`."""
        ends = [*itertools.accumulate(self.lengths[:-1]), num_steps]
        first = 0
        for value, end in zip(self.values, ends, strict=True):
            last = min(end, num_steps)
            if first < last:
                yield value, first, last
            first = end

    runs = pieces  # remove: the old name


# A number, or one that changes with the step.
ScalarOrSchedule: TypeAlias = float | Schedule
Scheduled: TypeAlias = float | Schedule  # remove: the old name


def as_schedule(value: ScalarOrSchedule) -> Schedule:
    """Returns a schedule as it is, and a number as a constant schedule.

    Args:
        value: a number or a schedule.

    Returns:
        A `Schedule`.

    Example:
        >>> as_schedule(1.5).at(3), as_schedule(Schedule((2.0, 1.0), (3, 3))).max
        (1.5, 2.0)
    """
    return value if isinstance(value, Schedule) else Schedule((value,), (1,))


def tabulate(schedule: optax.Schedule, num_steps: int) -> Schedule:
    """Evaluates an Optax schedule at every step of a run.

    Args:
        schedule: `schedule(step) -> value`, of the step alone.
        num_steps: of the run, at least 1.

    Returns:
        The same values, float32, run by run.

    Raises:
        ValueError: a value that is negative or not finite.

    Example:
        >>> import optax
        >>> tabulate(optax.piecewise_constant_schedule(2.0, {3: 0.5}), 5)
        Schedule(values=(2.0, 1.0), lengths=(3, 2))
    """
    num_steps = _validate.count("num_steps", num_steps)
    if isinstance(schedule, Schedule):
        return schedule
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules mix integers and floats
        values = jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(steps)
    table = np.asarray(values, np.float64)
    starts = np.flatnonzero(np.diff(table, prepend=np.nan))
    lengths = np.diff(starts, append=num_steps)
    return Schedule(tuple(table[starts].tolist()), tuple(lengths.tolist()))


def at(value: Scheduled, step: Int[Array, ""] | int) -> float | Float[Array, ""]:
    """Returns a number as it is, a schedule at `step`.

    Args:
        value: a number or a `Schedule`.
        step: traced or not.

    Returns:
        A Python float, or a float32 scalar.

    Example:
        >>> at(1.5, 3), float(at(Schedule((2.0, 1.0), (3, 3)), 3))
        (1.5, 1.0)
    """
    return value(step) if isinstance(value, Schedule) else value


def slice_of(value: Scheduled, start: int, stop: int) -> Scheduled:
    """Returns the schedule of the steps from `start` up to `stop`, counted from there.

    Args:
        value: a number, which is returned as it is, or a `Schedule`.
        start: the first step.
        stop: beyond the last one.

    Returns:
        A number or a `Schedule`.

    Example:
        >>> slice_of(Schedule((2.0, 1.0), (3, 3)), 2, 6)
        Schedule(values=(2.0, 1.0), lengths=(1, 3))
    """
    if not isinstance(value, Schedule):
        return value
    runs = [(level, last - max(first, start)) for level, first, last in value.runs(stop)]
    levels, lengths = zip(*((level, length) for level, length in runs if length > 0), strict=True)
    return Schedule(levels, lengths)


def extremes(value: Scheduled) -> tuple[float, float]:
    """Returns the least and the largest value that a number or schedule takes.

    Args:
        value: a number or a `Schedule`.

    Returns:
        The two, equal for a number.

    Example:
        >>> extremes(Schedule((2.0, 1.0), (3, 3)))
        (1.0, 2.0)
    """
    values = value.values if isinstance(value, Schedule) else (value,)
    return min(values), max(values)


def checked(name: str, value: Any, check: Callable[[str, Any], float]) -> Scheduled:
    """Returns a number, or a `Schedule`, whose every value passes `check`.

    Args:
        name: of the argument, for the message.
        value: of an argument.
        check: refuses a number or returns it.

    Returns:
        The number, or the schedule.

    Raises:
        TypeError: an Optax schedule that was not tabulated.

    Example:
        >>> checked("noise_multiplier", 2, lambda name, value: float(value))
        2.0
    """
    if isinstance(value, Schedule):
        for number in value.values:
            check(name, number)
        return value
    if callable(value):
        raise TypeError(
            f"{name} as an Optax schedule must be known for every step in advance; got a function. "
            "Pass dpoptax.schedules.tabulate(schedule, num_steps)."
        )
    return check(name, value)


def as_scheduled(value: Scheduled | optax.Schedule, num_steps: int) -> Scheduled:
    """Returns a number as it is, an Optax schedule tabulated.

    Args:
        value: a number or a schedule.
        num_steps: of the run.

    Returns:
        A number or a `Schedule`.

    Example:
        >>> as_scheduled(1.5, 10)
        1.5
    """
    return tabulate(value, max(num_steps, 1)) if callable(value) else value


def passes(value: Scheduled, num_steps: int, steps_per_pass: int = 1) -> dict[float, int]:
    """Counts passes over the data by the least value in each.

    Args:
        value: a number or a schedule.
        num_steps: of the run; a pass that has begun counts.
        steps_per_pass: how many steps one example takes part in once.

    Returns:
        How many passes there are of each value; more than MOST_LEVELS values are rounded down
        to so many, spaced evenly in the logarithm.

    Example:
        >>> passes(Schedule((2.0, 1.0), (4, 3)), 7, steps_per_pass=3)
        {2.0: 1, 1.0: 2}
    """
    if not isinstance(value, Schedule):
        return {value: -(-num_steps // steps_per_pass)}
    runs = list(value.runs(num_steps))
    if steps_per_pass == 1:
        counts = [(level, last - first) for level, first, last in runs]
    else:
        counts = list(_least_of_each_pass(runs, steps_per_pass))
    grid = sorted({level for level, _ in counts})
    if len(grid) > MOST_LEVELS and grid[0] > 0:
        grid = [grid[0], *np.geomspace(grid[0], grid[-1], MOST_LEVELS).tolist()[1:]]
    merged: dict[float, int] = {}
    for level, count in counts:
        level = grid[bisect.bisect_right(grid, level) - 1]
        merged[level] = merged.get(level, 0) + count
    return merged


def _least_of_each_pass(
    runs: list[tuple[float, int, int]], steps_per_pass: int
) -> Iterable[tuple[float, int]]:
    least: dict[int, float] = {}
    for level, first, last in runs:
        begins, ends = first // steps_per_pass, (last - 1) // steps_per_pass
        for edge in {begins, ends}:
            least[edge] = min(level, least.get(edge, math.inf))
        if ends - begins > 1:
            yield level, ends - begins - 1
    yield from ((level, 1) for level in least.values())
