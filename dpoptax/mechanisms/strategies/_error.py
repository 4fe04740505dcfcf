"""Error of a strategy: what its noise adds to the parameters."""

import math

import numpy as np

from dpoptax import _validate
from dpoptax.mechanisms._strategy import Strategy
from dpoptax.mechanisms.strategies._optimize import checked_momentum
from dpoptax.mechanisms.strategies._series import divide, prefix_sums
from dpoptax.mechanisms.strategies._toeplitz import ToeplitzStrategy


def prefix_sum_error(
    strategy: Strategy, num_steps: int | None = None, momentum: float = 0.0
) -> float:
    """Returns the root mean squared error of the prefix sums of a run, by coordinate.

    SGD moves the parameters by the learning rate times the sum of all noisy gradients so far. This
    is the standard deviation of the noise in that sum, in units of noise multiplier times clip
    bound; its root mean square over the steps. Independent noise has sqrt((num_steps + 1) / 2).

    Args:
        strategy: the strategy.
        num_steps: of the first steps only; all of them by default.
        momentum: of heavy-ball SGD, from 0 to below 1. The sums are then those of its velocities.

    Returns:
        The error.

    Raises:
        TypeError: `num_steps` is not whole, or `momentum` is not a number.
        ValueError: `momentum` is out of range.

    Example:
        >>> from dpoptax.mechanisms.strategies import BandedToeplitz
        >>> independent = BandedToeplitz((1.0,), num_steps=7)
        >>> prefix_sum_error(independent)
        2.0
        >>> prefix_sum_error(BandedToeplitz.optimal(3, num_steps=7)) < 2.0
        True
    """
    steps = strategy.num_steps if num_steps is None else num_steps
    steps = _validate.count("num_steps", steps)
    workload = prefix_sums(steps, checked_momentum(momentum))
    if isinstance(strategy, ToeplitzStrategy):
        noise = divide(workload, strategy.column(steps))
        weights = 1 - np.arange(steps) / steps
        return math.sqrt(float(weights @ noise**2))
    import scipy.linalg  # slow to import

    sums = scipy.linalg.toeplitz(workload, np.zeros(steps))
    rows = scipy.linalg.solve_triangular(strategy.matrix(steps).T, sums.T, lower=False)
    return float(np.linalg.norm(rows) / math.sqrt(steps))
