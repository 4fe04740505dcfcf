"""A target epsilon in, the least noise that reaches it out."""

import functools
import math
from collections.abc import Callable

import scipy.optimize
import scipy.stats

from dpoptax import _checks
from dpoptax.accounting.privacy_loss import event_epsilon
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers import Sampler

# Noise below this gives no guarantee worth the name, and its loss distribution no longer fits.
SMALLEST_NOISE_MULTIPLIER = 0.1
LARGEST_NOISE_MULTIPLIER = 1e6
# Of the logarithm of the noise.
TOLERANCE = 1e-4
# How much coarser than usual the grid of the search is: about that much faster.
SEARCH_COARSENING = 8.0


def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampler: Sampler,
    num_steps: int,
    relation: Relation = "add_or_remove_one",
) -> float:
    """Returns the least noise multiplier, to a relative 1e-3, that costs at most `epsilon`.

    Feasible by construction: the value returned is one at which epsilon was evaluated and found
    at or below the target.

    Args:
        epsilon: the target, positive.
        delta: strictly between 0 and 1, well below 1 / num_examples.
        sampler: the sampler that will run.
        num_steps: how many steps will run, at least 1.
        relation: which data sets count as neighbours.

    Returns:
        The noise multiplier: standard deviation of the noise on the sum / clip bound.

    Raises:
        TypeError: a count that is not whole, a number that is not real.
        ValueError: a number out of range, or a target that no noise in [0.1, 1e6] reaches.

    Example:
        >>> from dpoptax.accounting import epsilon
        >>> from dpoptax.samplers import Poisson
        >>> run = dict(sampler=Poisson(60_000, 128), num_steps=9375, delta=1e-5)
        >>> noise_multiplier = calibrate_noise_multiplier(epsilon=3.0, **run)
        >>> round(noise_multiplier, 3)
        0.67
        >>> 2.99 < epsilon(noise_multiplier=noise_multiplier, **run) <= 3.0
        True
    """
    target = _checks.positive("epsilon", epsilon)
    num_steps = _checks.count("num_steps", num_steps)
    delta = _checks.open_unit("delta", delta)
    parsed = parse_relation(relation)

    def excess(log_noise: float, coarsening: float = 1.0) -> float:
        """Falls as the noise grows; at most zero where the noise suffices."""
        event = sampler.event(math.exp(log_noise), num_steps, parsed)
        achieved = event_epsilon(event, delta=delta, relation=parsed, coarsening=coarsening)
        return math.log(max(achieved, 1e-12) / target)

    # The search runs on a coarse grid, which overstates epsilon a little: its root is feasible.
    coarse = functools.lru_cache(functools.partial(excess, coarsening=SEARCH_COARSENING))
    rate = sampler.expected_batch_size / sampler.num_examples
    root = _root(coarse, _first_guess(target, delta, rate, num_steps))
    slope = (coarse(root + 0.02) - coarse(root)) / 0.02
    while (rest := excess(root)) > 0:
        root += TOLERANCE
    if root <= math.log(SMALLEST_NOISE_MULTIPLIER) or slope >= 0:
        return math.exp(root)
    # Newton and then the secant, on the fine grid, take back what the coarse one overstated.
    refined = root - rest / slope + TOLERANCE / 2
    for _ in range(2):
        beyond = excess(refined) if refined < root else 0.0
        if beyond <= 0:
            return math.exp(min(refined, root))
        refined += (root - refined) * beyond / (beyond - rest) + TOLERANCE / 2
    return math.exp(root)


def _first_guess(epsilon: float, delta: float, rate: float, num_steps: int) -> float:
    """The logarithm of the noise at which the central limit of many small steps meets epsilon.

    mu = rate * sqrt(num_steps * (exp(1 / noise**2) - 1)) (Bu et al. 2020, arXiv:1911.11607).
    """
    normal = scipy.stats.norm

    def excess_delta(mu: float) -> float:
        gap = -epsilon / mu
        tail = math.exp(min(epsilon + normal.logcdf(gap - mu / 2), 0.0))
        return float(normal.cdf(gap + mu / 2) - tail - delta)

    mu = scipy.optimize.brentq(excess_delta, 1e-8, epsilon + 50.0)
    noise = math.log1p((mu / rate) ** 2 / num_steps) ** -0.5
    return math.log(min(max(noise, SMALLEST_NOISE_MULTIPLIER), LARGEST_NOISE_MULTIPLIER))


def _root(excess: Callable[[float], float], guess: float) -> float:
    """Returns the point where a falling function reaches zero, to half the tolerance above it.

    The smallest noise considered is returned where even that suffices.
    """
    lowest, highest = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(LARGEST_NOISE_MULTIPLIER)
    low = high = guess
    step = 0.05
    while excess(high) > 0:
        if high >= highest:
            raise ValueError(
                f"no noise multiplier up to {LARGEST_NOISE_MULTIPLIER:g} reaches this epsilon: "
                "take a larger epsilon or delta, or fewer steps."
            )
        low, high, step = high, min(high + step, highest), 2 * step
    while excess(low) <= 0:
        if low <= lowest:
            return lowest
        low, high, step = max(low - step, lowest), low, 2 * step
    root: float = scipy.optimize.brentq(excess, low, high, xtol=TOLERANCE / 4)
    return root + TOLERANCE / 2
