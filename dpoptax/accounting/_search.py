"""One-dimensional searches: the smallest root, and the largest whole number that is feasible.

Each evaluation of epsilon takes milliseconds to seconds, so both searches are sparing with them.
"""

import functools
import math
from collections.abc import Callable

# How exactly the logarithm of the noise multiplier is found.
TOLERANCE = 1e-4


def smallest_root(
    excess: Callable[[float], float], guess: float, lowest: float, highest: float
) -> float:
    """Returns where a falling function reaches zero, or half the tolerance above that.

    `guess` must lie within the bounds. Returns `lowest` if the function is not positive there, and
    inf if it is still positive at `highest`.
    """
    import scipy.optimize  # slow to import

    excess = functools.lru_cache(excess)
    low = high = guess
    # Bracket the root by steps that double, upward and then downward.
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
    """Returns the largest whole number at which a growing function is not positive.

    At the returned number `excess` was evaluated. Returns 0 if even 1 is not feasible. The function
    should grow about as a power of the number; the search is quick then.
    """
    values: dict[int, float] = {}
    low, high = 0, highest + 1  # feasible, infeasible
    number, factor = min(max(int(min(guess, highest)), 1), highest), 1.01
    # Bracket the answer: leave the guess by a factor that is squared each time.
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
            return _largest_between(excess, low, high, values[low], values[high])
        factor = factor**2
    return low


def _largest_between(
    excess: Callable[[int], float], low: int, high: int, below: float, above: float
) -> int:
    """The largest feasible number from `low` on, below `high`, by false position in the logarithm.

    `below` and `above` are the values at the two ends. The value at an end that stays is halved
    (the Illinois method), so that both ends move.
    """
    trial = 0
    while high - low > 1:
        # Every fourth trial halves the interval: a function with jumps defeats false position.
        fraction = -below / (above - below) if trial % 4 < 3 and above > below else 0.5
        point = math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
        number = min(max(round(point), low + 1), high - 1)
        value = excess(number)
        if value <= 0:
            low, below, above = number, value, above / 2
        else:
            high, above, below = number, value, below / 2
        trial += 1
    return low
