"""Sensitivity of a strategy: how far one example moves `C x`, in clip bounds.

Let an example take part in the steps of a pattern P, with a contribution of norm at most one in
each. It moves `C x` by the sum of u_t times column t of C over t in P, whose squared norm is

    sum over s, t in P of (C^T C)[s, t] <u_s, u_t>  <=  sum over s, t in P of |(C^T C)[s, t]|.   (1)

Equality holds for equal u where C^T C has no negative entry. The sensitivity is the root of the
largest such sum over all patterns.
"""

import math

import numpy as np

from dpoptax import _validate
from dpoptax._patterns import Cyclic, OncePerRound, Pattern, Separated
from dpoptax.mechanisms._strategy import Strategy
from dpoptax.mechanisms.strategies._series import Series, repeated
from dpoptax.mechanisms.strategies._toeplitz import ToeplitzStrategy

# Results are rounded up by this factor, which is more than all rounding errors of float64.
ROUND_UP = 1 + 1e-6
# Up to here the bound for any matrix is computed too, in a second or so. The smaller one counts.
MOST_DENSE_STEPS = 2048


def sensitivity(strategy: Strategy, pattern: Pattern, num_steps: int | None = None) -> float:
    """Returns how far one example moves the sums before the noise, in clip bounds.

    Without amplification by sampling, a run with correlated noise is one Gaussian mechanism, and
    its noise multiplier is that of the run divided by this number. For one participation the
    number is one, because strategies are scaled.

    It is exact for Toeplitz strategies of numbers that are not negative, under `Cyclic`, and under
    `Separated` if they also do not increase or are at most `separation` many. It is exact for
    all strategies with as many bands as the steps between two participations, or fewer. Elsewhere
    it is an upper bound.

    Args:
        strategy: the strategy.
        pattern: in which steps an example may take part.
        num_steps: of the first steps only; all of them by default.

    Returns:
        The number, rounded up by one part in a million.

    Raises:
        TypeError: `num_steps` is not whole.
        ValueError: `num_steps` exceeds the steps of the strategy.

    Example:
        >>> from dpoptax.mechanisms.strategies import BandedToeplitz, Separated
        >>> strategy = BandedToeplitz((1.0, 0.5), num_steps=100)
        >>> round(sensitivity(strategy, Separated(2, count=9)), 4)
        3.0
        >>> round(sensitivity(strategy, Separated(1, count=9)), 3)
        3.924

    Reference: Choquette-Choo et al. 2023, arXiv:2306.08153, section 4 and appendix; Kalinin and
    Lampert 2024, arXiv:2405.13763, theorem 2, for the worst pattern of Toeplitz matrices.
    """
    steps = strategy.num_steps if num_steps is None else num_steps
    steps = _validate.count("num_steps", steps)
    if steps > strategy.num_steps:
        raise ValueError(
            f"the strategy covers {strategy.num_steps} steps; got num_steps={steps}. Make it for "
            "as many steps as the run has."
        )
    bounds = []
    is_exact = False
    if isinstance(strategy, ToeplitzStrategy):
        squared, is_exact = _of_toeplitz(strategy.column(steps), pattern)
        bounds.append(squared)
    if not bounds or (not is_exact and steps <= MOST_DENSE_STEPS):
        bounds.append(_of_matrix(strategy.matrix(steps), pattern))
    return math.sqrt(min(bounds)) * ROUND_UP


def _of_toeplitz(column: Series, pattern: Pattern) -> tuple[float, bool]:
    """The square, from the first column, and whether it is exact.

    Larger entries of a matrix without negative ones only make (1) larger. So the bound of the
    absolute values holds, and that of the smallest column above them that does not increase. The
    worst pattern of the latter has the smallest gaps and starts at the first step.
    """
    has_negative = bool((column < 0).any())
    column = abs(column)
    num_bands = int(np.flatnonzero(column)[-1]) + 1
    decreasing = np.maximum.accumulate(column[::-1])[::-1]
    count = pattern.largest_count(len(column))
    match pattern:
        case Cyclic(period=period):
            # Another start is the same sum, cut off earlier.
            squared = float(np.sum(repeated(column, period, count) ** 2))
            return squared, not has_negative or num_bands <= period
        case Separated(separation=separation):
            # Columns that do not overlap are orthogonal. The first ones are cut off the least.
            terms = column if num_bands <= separation else decreasing
            squared = float(np.sum(repeated(terms, separation, count) ** 2))
            is_decreasing = not has_negative and bool((column == decreasing).all())
            return squared, num_bands <= separation or is_decreasing
    return _by_gaps(decreasing, pattern, count), False


def _by_gaps(decreasing: Series, pattern: Pattern, count: int) -> float:
    """Bounds (1) by the inner product of two columns at the smallest gap that they may have."""
    total = count * float(decreasing @ decreasing)
    for distance in range(1, count):
        gap = pattern.smallest_gap(distance)
        if gap >= len(decreasing):
            break
        product = float(decreasing[gap:] @ decreasing[: len(decreasing) - gap])
        total += 2 * (count - distance) * product
    return total


def _of_matrix(matrix: np.ndarray, pattern: Pattern) -> float:
    """The square, for any matrix: (1) is at most a sum over one step of the largest sums over two.

    Both are found by dynamic programming, or by enumeration where there are few patterns.
    """
    steps = len(matrix)
    norms = np.linalg.norm(matrix, axis=0)
    # Rounding errors of the inner products, whose terms may cancel.
    gram = abs(matrix.T @ matrix) + steps * np.finfo(float).eps * norms[:, None] * norms
    if isinstance(pattern, Cyclic):
        starts = range(min(pattern.period, steps))
        blocks = (slice(start, None, pattern.period) for start in starts)
        return max(float(gram[block, block].sum()) for block in blocks)
    if isinstance(pattern, Separated | OncePerRound):
        gram[pattern.excludes(steps)] = 0
    by_step = pattern.heaviest(gram)
    return float(pattern.heaviest(by_step[None])[0])
