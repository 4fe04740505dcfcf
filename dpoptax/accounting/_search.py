"""A function that grows or falls, and where it crosses zero."""

import functools
import math
from collections.abc import Callable

import scipy.optimize

# Of the logarithm of what is searched.
TOLERANCE = 1e-4


def smallest_root(
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


def largest_feasible(excess: Callable[[int], float], guess: float, highest: int) -> int:
    """Returns the largest whole number at which a growing function is not above zero.

    Args:
        excess: grows with the number, about as a power of it.
        guess: where the search begins.
        highest: the end of the search.

    Returns:
        A number at which `excess` was evaluated and found at most zero; 0 if there is none.
    """
    values: dict[int, float] = {}
    low, high = 0, highest + 1  # feasible, infeasible
    number, factor = min(max(int(min(guess, highest)), 1), highest), 1.01
    while high - low > 1:
        values[number] = excess(number)
        if values[number] <= 0:
            low = number
        else:
            high = number
        if low == 0:
            number = max(int(number / factor), 1)
        elif high > highest:
            number = min(max(int(number * factor), number + 1), highest)
        else:
            return _between(excess, low, high, values[low], values[high])
        factor = factor**2
    return low


def _between(
    excess: Callable[[int], float], low: int, high: int, below: float, above: float
) -> int:
    """The largest feasible number from `low` on, below `high`: regula falsi, in the logarithm.

    The value at an end that stays is halved (the Illinois method), so that both ends move; every
    fourth point halves the interval, so that a function with steps ends too.
    """
    turn = 0
    while high - low > 1:
        share = -below / (above - below) if turn % 4 < 3 and above > below else 0.5
        point = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        number = min(max(round(point), low + 1), high - 1)
        value = excess(number)
        if value <= 0:
            low, below, above = number, value, above / 2
        else:
            high, above, below = number, value, below / 2
        turn += 1
    return low
