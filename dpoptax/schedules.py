"""An Optax schedule in, its value at every step out, as something that can be accounted.

A schedule fixed before the run composes freely; what depends on earlier releases does not, and is
the business of `accounting.RdpFilter`.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dpoptax import _validate

# More distinct values than this are rounded down to so many levels before they are accounted.
MOST_LEVELS = 50


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A number that changes after steps known in advance; the last value holds for ever.

    Called with a step it is an Optax schedule, traceable.

    Attributes:
        values: one for each run of steps, zero or more.
        lengths: how many steps each of them lasts, at least 1.

    Raises:
        TypeError: a value that is no number, a length that is not whole.
        ValueError: a negative value, values and lengths of different number, or none.

    Example:
        >>> noise_multiplier = Schedule(values=(1.5, 1.0), lengths=(100, 900))
        >>> [float(noise_multiplier(step)) for step in (0, 99, 100, 5000)]
        [1.5, 1.5, 1.0, 1.0]
    """

    values: tuple[float, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        values = tuple(_validate.non_negative("values", value) for value in self.values)
        lengths = tuple(_validate.count("lengths", length) for length in self.lengths)
        if not values or len(values) != len(lengths):
            raise ValueError(
                "values and lengths must be as many, at least one of each; got "
                f"{len(values)} and {len(lengths)}."
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "lengths", lengths)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns the value at `step`, float32."""
        ends = np.minimum(np.cumsum(self.lengths), np.iinfo(np.int32).max)[:-1]
        run = jnp.searchsorted(jnp.asarray(ends, jnp.int32), jnp.asarray(step), side="right")
        return jnp.asarray(self.values, jnp.float32)[run]

    def runs(self, num_steps: int) -> Iterator[tuple[float, int, int]]:
        """Gives the value, first step and end of every run that begins before `num_steps`."""
        ends = [*itertools.accumulate(self.lengths[:-1]), num_steps]
        first = 0
        for value, end in zip(self.values, ends, strict=True):
            last = min(end, num_steps)
            if first < last:
                yield value, first, last
            first = end


# What may change with the step wherever a number stands.
Scheduled: TypeAlias = float | Schedule


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
