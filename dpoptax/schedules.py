"""Piecewise-constant schedules: numbers that change with the step and are known before the run.

A schedule that is fixed before the run can be accounted step by step. A value that depends on
earlier releases cannot be a schedule: use `dpoptax.accounting.RdpFilter` for that.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dpoptax import _validate

__all__ = ["Schedule", "tabulate"]


def __dir__() -> list[str]:
    return __all__


def _values(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(map(_value, values))


def _value(value: float) -> float:
    # Infinity is allowed for a clip bound that does not clip.
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
                f"{len(self.values)} values and {len(self.lengths)} lengths. Pass one length per "
                "value."
            )

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns the value at `step`, as float32."""
        # The last piece has no end, and a traced step is int32: a piece that ends later never ends.
        ends = np.minimum(np.cumsum(self.lengths), np.iinfo(np.int32).max)[:-1]
        piece = jnp.searchsorted(jnp.asarray(ends, jnp.int32), jnp.asarray(step), side="right")
        return jnp.asarray(self.values, jnp.float32)[piece]

    def at(self, step: Int[Array, ""] | int) -> float | Float[Array, ""]:
        """Returns the value at `step`: a Python float for a constant, else a float32 scalar."""
        return self.values[0] if len(self.values) == 1 else self(step)

    @property
    def ends(self) -> tuple[int, ...]:
        """The step after the last one of each piece but the last, which never ends."""
        return tuple(itertools.accumulate(self.lengths[:-1]))

    def value_at(self, step: int) -> float:
        """Returns the value at a step that is known, without rounding it to float32."""
        return self.values[bisect.bisect_right(self.ends, step)]

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
        """Yields the value, first step and end of every piece that begins before `num_steps`.

        The end is the step after the last one, and at most `num_steps`.
        """
        ends = [*self.ends, num_steps]
        first = 0
        for value, end in zip(self.values, ends, strict=True):
            last = min(end, num_steps)
            if first < last:
                yield value, first, last
            first = end


# A number, or one that changes with the step.
ScalarOrSchedule: TypeAlias = float | Schedule


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


def root_sum_of_squares(values: Sequence[ScalarOrSchedule]) -> ScalarOrSchedule:
    """Returns sqrt(sum of squares) at each step; a number if all values are numbers.

    Args:
        values: numbers and schedules, at least one.

    Returns:
        A number, or a schedule with a piece wherever one of the schedules has one.

    Example:
        >>> root_sum_of_squares([3.0, Schedule((4.0, 0.0), (10, 5))])
        Schedule(values=(5.0, 3.0), lengths=(10, 1))
    """
    tables = [as_schedule(value) for value in values]
    if not any(isinstance(value, Schedule) for value in values):
        return math.hypot(*(table.values[0] for table in tables))
    # A piece of the result begins where one of any schedule does. The last one never ends.
    starts = sorted({0, *(end for table in tables for end in table.ends)})
    columns = [[table.value_at(start) for table in tables] for start in starts]
    lengths = [*(end - start for start, end in itertools.pairwise(starts)), 1]
    return Schedule(tuple(math.hypot(*column) for column in columns), tuple(lengths))


def tabulate(schedule: optax.Schedule, num_steps: int) -> Schedule:
    """Evaluates an Optax schedule at every step of a run.

    Args:
        schedule: `schedule(step) -> value`, a function of nothing but the step.
        num_steps: how many steps the run has, at least 1.

    Returns:
        A `Schedule` of the same values, rounded to float32. A `Schedule` is returned as it is.

    Raises:
        ValueError: a value is negative or not finite.

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
    if not np.all(np.isfinite(table)):
        step = int(np.argmin(np.isfinite(table)))
        raise ValueError(
            f"a schedule must have finite values; got {table[step]} at step {step}. Check whether "
            "it overflows float32."
        )
    # A piece starts where the value changes; NaN differs from every value, so step 0 is a start.
    starts = np.flatnonzero(np.diff(table, prepend=np.nan))
    lengths = np.diff(starts, append=num_steps)
    return Schedule(tuple(table[starts].tolist()), tuple(lengths.tolist()))


def validated(name: str, value: Any, check: Callable[[str, Any], float]) -> ScalarOrSchedule:
    """Returns a number, or a schedule, after every value of it has passed `check`.

    Args:
        name: the name of the argument, for error messages.
        value: the argument.
        check: a function such as `_validate.positive`, which returns a number or raises.

    Returns:
        The number, or the schedule.

    Raises:
        TypeError: the argument is an Optax schedule, which must be tabulated first.

    Example:
        >>> validated("noise_multiplier", 2, lambda name, value: float(value))
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
