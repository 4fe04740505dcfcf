"""A function that grows or falls, and where it crosses zero."""

import functools
import math
from collections.abc import Callable

import scipy.optimize

# Of the logarithm of what is searched.
TOLERANCE = 1e-4


def least_root(
    excess: Callable[[float], float], guess: float, lowest: float, highest: float
) -> float:
    """Returns where a falling function reaches zero, to half the tolerance above it.

    Args:
        excess: falls.
        guess: within the bounds.
        lowest: returned where even there the function is not above zero.
        highest: the end of the search.

    Returns:
        The root; inf if the function is above zero at `highest`.
    """
    excess = functools.lru_cache(excess)
    low = high = guess
    step = 0.05
    while excess(high) > 0:
        if high >= highest:
            return math.inf
        low, high, step = high, min(high + step, highest), 2 * step
    while excess(low) <= 0:
        if low <= lowest:
            return lowest
        low, high, step = max(low - step, lowest), low, 2 * step
    root: float = scipy.optimize.brentq(excess, low, high, xtol=TOLERANCE / 4)
    return root + TOLERANCE / 2


def most_feasible(excess: Callable[[int], float], guess: float, highest: int) -> int:
    """Returns the largest whole number at which a growing function is not above zero.

    Args:
        excess: grows with the number, about as a power of it.
        guess: where the search begins.
        highest: the end of the search.

    Returns:
        A number at which `excess` was evaluated and found at most zero; 0 if there is none.
    """
    excess = functools.lru_cache(excess)
    low, high = 0, highest + 1  # feasible, infeasible
    number = min(max(int(guess), 1), highest)
    factor = 1.1
    while high - low > 1:
        if excess(number) <= 0:
            low = number
        else:
            high = number
        if low == 0:
            number = max(int(number / factor), 1)
        elif high > highest:
            number = min(max(int(number * factor), number + 1), highest)
        else:
            number = _between(excess, low, high)
            continue
        factor = factor**2
    return low


def _between(excess: Callable[[int], float], low: int, high: int) -> int:
    """A number strictly between, near where the line through the ends, in the logarithm, is zero.

    The point is pushed out a little, alternately, so that both ends move.
    """
    below, above = excess(low), excess(high)
    share = 0.5
    if math.isfinite(above) and math.isfinite(below) and above > below:
        share = min(max(-below / (above - below), 0.02), 0.98)
    point = math.exp((1 - share) * math.log(low) + share * math.log(high))
    if high - low > 8:
        margin = max(1.0, 0.02 * (high - low))
        point += margin if -below > above else -margin
    return min(max(round(point), low + 1), high - 1)
