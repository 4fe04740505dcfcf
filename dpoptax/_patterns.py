"""Patterns of participation: sets of steps in which one example may take part."""

import abc
import collections

import attrs
import numpy as np
from jaxtyping import Float64

from dpoptax import _validate


def _separation(value: int) -> int:
    return _validate.count("separation", value)


def _period(value: int) -> int:
    return _validate.count("period", value)


def _most(value: int | None) -> int | None:
    return None if value is None else _validate.count("count", value)


class Pattern(abc.ABC):
    """Base class: the patterns of steps in which one example may take part.

    Any part of a pattern is a pattern too.
    """

    @abc.abstractmethod
    def largest_count(self, num_steps: int) -> int:
        """Returns in how many of the first `num_steps` steps an example takes part at most."""

    @abc.abstractmethod
    def smallest_gap(self, distance: int) -> int:
        """Returns how many steps there are at least from a participation to the n-th after it."""

    @abc.abstractmethod
    def excludes(self, num_steps: int) -> np.ndarray:
        """Returns which pairs of different steps no pattern has, bool `(steps, steps)`."""

    @abc.abstractmethod
    def heaviest(self, weights: Float64[np.ndarray, "rows steps"]) -> Float64[np.ndarray, " rows"]:
        """Returns, for each row of weights of at least zero, the largest sum over a pattern."""


@attrs.frozen
class Separated(Pattern):
    """Two participations are at least `separation` steps apart, and there are at most `count`.

    Attributes:
        separation: in steps; 1 allows any steps.
        count: None for as many as fit.

    Raises:
        TypeError: a number is not whole.
        ValueError: a number is below 1.

    Example:
        >>> Separated(separation=4).largest_count(num_steps=9)
        3
    """

    separation: int = attrs.field(converter=_separation)
    count: int | None = attrs.field(default=None, converter=_most)

    def largest_count(self, num_steps: int) -> int:
        """See `Pattern`."""
        fitting = -(-num_steps // self.separation)
        return fitting if self.count is None else min(self.count, fitting)

    def smallest_gap(self, distance: int) -> int:
        """See `Pattern`."""
        return distance * self.separation

    def excludes(self, num_steps: int) -> np.ndarray:
        """See `Pattern`."""
        steps = np.arange(num_steps)
        gaps = abs(steps[:, None] - steps)
        return (gaps > 0) & (gaps < self.separation)

    def heaviest(self, weights: Float64[np.ndarray, "rows steps"]) -> Float64[np.ndarray, " rows"]:
        """See `Pattern`."""
        rows, steps = weights.shape
        fitting = -(-steps // self.separation)
        # Where every pattern that fits is allowed, participations need not be counted.
        unlimited = self.count is None or self.count >= fitting
        count = 1 if unlimited else self.largest_count(steps)
        # The largest sums over the first steps by number of participations, for the last numbers
        # of steps. Weights are not negative, so at most n and exactly n are the same.
        best = collections.deque([np.zeros((count + 1, rows))], maxlen=self.separation)
        for step in range(steps):
            before = best[0]
            joined = (before if unlimited else before[:-1]) + weights[:, step]
            now = best[-1].copy()
            now[-len(joined) :] = np.maximum(now[-len(joined) :], joined)
            best.append(now)
        return best[-1][-1]


@attrs.frozen
class Cyclic(Pattern):
    """An example takes part in the steps i, i + period, i + 2 * period and so on, for one i.

    Attributes:
        period: in steps.

    Raises:
        TypeError: the number is not whole.
        ValueError: the number is below 1.

    Example:
        >>> Cyclic(period=4).smallest_gap(2)
        8
    """

    period: int = attrs.field(converter=_period)

    def largest_count(self, num_steps: int) -> int:
        """See `Pattern`."""
        return -(-num_steps // self.period)

    def smallest_gap(self, distance: int) -> int:
        """See `Pattern`."""
        return distance * self.period

    def excludes(self, num_steps: int) -> np.ndarray:
        """See `Pattern`."""
        turns = np.arange(num_steps) % self.period
        return turns[:, None] != turns

    def heaviest(self, weights: Float64[np.ndarray, "rows steps"]) -> Float64[np.ndarray, " rows"]:
        """See `Pattern`."""
        starts = range(min(self.period, weights.shape[1]))
        return np.max([weights[:, start :: self.period].sum(axis=1) for start in starts], axis=0)


@attrs.frozen
class OncePerRound(Pattern):
    """An example takes part in at most one step of each round, and in any one.

    Attributes:
        period: how many steps a round has.

    Raises:
        TypeError: the number is not whole.
        ValueError: the number is below 1.

    Example:
        >>> OncePerRound(period=4).smallest_gap(1), OncePerRound(period=4).smallest_gap(2)
        (1, 5)
    """

    period: int = attrs.field(converter=_period)

    def largest_count(self, num_steps: int) -> int:
        """See `Pattern`."""
        return -(-num_steps // self.period)

    def smallest_gap(self, distance: int) -> int:
        """See `Pattern`."""
        # The last step of a round and the first one of a later round.
        return (distance - 1) * self.period + 1 if distance else 0

    def excludes(self, num_steps: int) -> np.ndarray:
        """See `Pattern`."""
        rounds = np.arange(num_steps) // self.period
        return (rounds[:, None] == rounds) & ~np.eye(num_steps, dtype=bool)

    def heaviest(self, weights: Float64[np.ndarray, "rows steps"]) -> Float64[np.ndarray, " rows"]:
        """See `Pattern`."""
        starts = range(0, weights.shape[1], self.period)
        rounds = [weights[:, start : start + self.period].max(axis=1) for start in starts]
        return np.sum(rounds, axis=0)
