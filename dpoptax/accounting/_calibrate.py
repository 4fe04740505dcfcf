"""Calibration of the noise: the least that keeps a privacy budget.

The cost was evaluated at the noise that is returned, and is within the budget.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import dp_accounting

from dpoptax import _validate
from dpoptax._foreign_names import answer_foreign_names
from dpoptax.accounting import _search as search
from dpoptax.accounting._attack_risk import AttackRisk
from dpoptax.accounting._budget import Budget, first_log_noise
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.relations import Relation
from dpoptax.samplers import Sampler

# With less noise there is no guarantee worth the name.
SMALLEST_NOISE_MULTIPLIER = 0.1
# The end of the search, beyond any use.
LARGEST_NOISE_MULTIPLIER = 1e9
# How much coarser than usual the grid is while searching; about that much faster. A coarse grid
# overstates epsilon a little, so that the answer is improved on the usual grid at the end.
SEARCH_COARSENING = 8.0


class CalibratedNoise(NamedTuple):
    """The noise multiplier that was found, and its epsilon, which is at most the one asked for."""

    noise_multiplier: float
    epsilon: float


@answer_foreign_names
def calibrate_noise_multiplier(
    *,
    epsilon: float | None = None,
    risk: AttackRisk | None = None,
    delta: float,
    sampler: Sampler,
    num_steps: int | None = None,
    epochs: float | None = None,
    relation: Relation | None = None,
    earlier: dp_accounting.DpEvent | None = None,
    mechanism: AnyMechanism = Gaussian(),
) -> CalibratedNoise:
    """Finds the least noise multiplier, to a relative 1e-3, that costs at most `epsilon`.

    Args:
        epsilon: the target, positive; or
        risk: what an attack may reach at most: `Advantage`, `TruePositiveRate`, `PosteriorBelief`
            or `Reconstruction`. Give one of the two.
        delta: strictly between 0 and 1, and well below 1 / num_examples.
        sampler: the sampler that will run.
        num_steps: how many steps will run, at least 1; or
        epochs: how often each example takes part on average. Give one of the two.
        relation: which data sets are neighbours; None for the sampler's own relation, which is
            `replace_special` for `Shuffled` and `CyclicPoisson`.
        earlier: the event of other releases on the same data, which the target also pays for: for
            `mechanisms.norm_quantile`, `sampler.event(noise_multiplier, 1)`.
        mechanism: how the noise will be drawn.

    Returns:
        The noise multiplier, at least 0.1, and its epsilon at `delta`.

    Raises:
        TypeError: a count is not whole, or a number is not real; or of two alternatives, both or
            none were given.
        ValueError: a number is out of range; or no noise up to 1e9 reaches the target, with what
            is reached.

    Warns:
        UserWarning: delta is above 1 / num_examples.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> noise_multiplier, achieved = calibrate_noise_multiplier(
        ...     epsilon=3.0, delta=1e-5, sampler=Poisson(60_000, 128), num_steps=9375
        ... )
        >>> round(noise_multiplier, 2), 2.99 < achieved <= 3.0
        (0.67, True)
    """
    steps = num_steps_of(sampler, epochs, num_steps)
    if earlier is not None and not isinstance(earlier, dp_accounting.DpEvent):
        raise TypeError(
            f"earlier must be an event of dp-accounting; got {_validate.described(earlier)}. Pass "
            "for example sampler.event(noise_multiplier, 1)."
        )
    budget = Budget(epsilon, delta, relation, earlier, mechanism, risk)
    _validate.warn_of_large_delta(budget.delta, sampler.num_examples, sampler.unit)

    tried: dict[float, float] = {}

    def cost(log_noise: float, coarsening: float = 1.0) -> float:
        tried[log_noise] = budget.cost(sampler, math.exp(log_noise), steps, coarsening)
        return tried[log_noise]

    def found(log_noise: float, spent: float) -> CalibratedNoise:
        noise = math.exp(log_noise)
        return CalibratedNoise(noise, budget.epsilon_of(spent, sampler, noise, steps))

    coarse = functools.lru_cache(
        lambda log_noise: budget.excess(cost(log_noise, SEARCH_COARSENING))
    )
    # The cost is about a power of the noise, so that the search is over its logarithm.
    lowest, highest = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(LARGEST_NOISE_MULTIPLIER)
    guess = min(max(first_log_noise(budget, sampler, steps), lowest), highest)
    root = search.smallest_root(coarse, guess, lowest, highest)
    if math.isinf(root) and cost(highest) > budget.limit:
        # As a rule the largest noise. But the rounding of many steps can cost more than they do.
        best = min(tried, key=lambda log_noise: tried[log_noise])
        raise budget.out_of_reach(
            f"even a noise multiplier of {math.exp(best):.4g} costs {tried[best]:.4g}. Take a "
            f"larger {budget.limit_name}, fewer steps, or a larger max_batch_size: overflow is "
            "paid from delta. Earlier releases count too."
        )
    root = min(root, highest)
    # The slope tells how much noise the coarse grid's excess costs.
    slope = (coarse(root + 0.02) - coarse(root)) / 0.02
    # The coarse grid overstates the cost, so its root is feasible but for rounding.
    while (spent := cost(root)) > budget.limit:
        root += search.TOLERANCE
    # At the end of the range nothing can be improved; a flat curve has no Newton step.
    if root == lowest or slope >= 0:
        return found(root, spent)
    return found(*_less_noise(budget, cost, (root, spent), lowest, slope))


def with_noise_for(
    sampler: Sampler, found: CalibratedNoise, budget: Budget, num_steps: int
) -> CalibratedNoise:
    """Returns noise for a sampler that costs a little more than the one it was found for."""
    log_noise = math.log(found.noise_multiplier)
    while (spent := budget.cost(sampler, math.exp(log_noise), num_steps)) > budget.limit:
        # The cost falls at least as fast as the noise grows, so one step is enough as a rule.
        log_noise += budget.excess(spent) + search.TOLERANCE / 2
    noise = math.exp(log_noise)
    return CalibratedNoise(noise, budget.epsilon_of(spent, sampler, noise, num_steps))


def _less_noise(
    budget: Budget,
    cost: Callable[[float], float],
    feasible: tuple[float, float],
    lowest: float,
    slope: float,
) -> tuple[float, float]:
    """Improves a feasible log noise and its cost on the usual grid: a Newton step, then secants."""
    root, spent = feasible
    rest = budget.excess(spent)
    refined = root - rest / slope + search.TOLERANCE / 2
    # Usually the first step succeeds; the noise at hand is feasible already, so that three suffice.
    for _ in range(3):
        if not lowest < refined < root:
            break
        refined_cost = cost(refined)
        if refined_cost <= budget.limit:
            return refined, refined_cost
        beyond = budget.excess(refined_cost)
        refined += (root - refined) * beyond / (beyond - rest) + search.TOLERANCE / 2
    return feasible
