"""A plan with correlated noise: the number of bands with the smallest error at a target epsilon.

More bands cancel more noise between steps. But an example then has its turn at fewer steps, at a
higher rate, which is amplified less and needs more noise. The best number of bands depends on the
budget, and it can be one: independent noise.
"""

import functools
import math
from typing import Any

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax.accounting import calibrate_noise_multiplier
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.mechanisms import Correlated, Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.mechanisms.strategies import BandedToeplitz, prefix_sum_error
from dpoptax.samplers import Poisson, RandomCyclicPoisson, Sampler

# Errors of numbers of bands that are closer to each other than this differ by one percent or so.
RATIO = 1.5
# Fewer bands are preferred to a gain smaller than this, because they need less memory.
SMALLEST_GAIN = 0.005


def correlated_plan(
    *,
    num_examples: int,
    expected_batch_size: float,
    clip: Any,
    epochs: float | None = None,
    num_steps: int | None = None,
    epsilon: float,
    delta: float,
    momentum: float = 0.0,
    max_bands: int = 16,
) -> Plan:
    """Returns the plan for a budget whose noise moves the parameters least.

    It compares banded Toeplitz strategies of several numbers of bands, each with cyclic Poisson
    batches of as many groups, and with the noise that meets the budget. It takes the one with the
    smallest mean squared error of the prefix sums of the noise, which is what SGD adds to the
    parameters. If independent noise is best, it is an ordinary plan: Poisson batches and
    `mechanisms.Gaussian()`.

    Correlated noise pays at a large epsilon, with small batches and many steps. Every example draws
    its group at random, so both kinds of plans have a guarantee under `add_or_remove_one`. A run
    with b bands keeps b - 1 copies of the gradient's noise.

    Args:
        num_examples: how many examples there are.
        expected_batch_size: the mean batch size.
        clip: the bound on the norm of one example's gradient, or a clip rule with a fixed bound.
        epochs: how often each example takes part on average; or
        num_steps: how many steps to plan, and no more can follow. Give one of the two.
        epsilon: the budget.
        delta: strictly between 0 and 1, and well below 1 / num_examples.
        momentum: that of the optimizer, from 0 to below 1: its sums are what counts then.
        max_bands: the largest number of bands, for memory.

    Returns:
        A plan with `plan.epsilon() <= epsilon`.

    Raises:
        TypeError: an argument has the wrong type; or of two alternatives, both or none were given.
        ValueError: a number is out of range, or the clip bound changes.

    Warns:
        UserWarning: delta is above 1 / num_examples.

    Example:
        >>> plan = correlated_plan(
        ...     num_examples=60_000, expected_batch_size=1024, clip=1.0, epochs=1, epsilon=8.0,
        ...     delta=1e-6, max_bands=4,
        ... )
        >>> plan.mechanism.strategy.num_bands, plan.sampler.num_groups
        (4, 4)

    Reference: Choquette-Choo et al. 2023, arXiv:2306.08153.
    """
    most = _validate.count("max_bands", max_bands)
    ordinary = Poisson(num_examples, expected_batch_size)
    steps = num_steps_of(ordinary, epochs, num_steps)
    # The batch of a step is drawn from one group, which must be large enough for it.
    most = min(most, math.floor(num_examples / ordinary.expected_batch_size), steps)

    @functools.cache
    def settings(bands: int) -> tuple[Sampler, AnyMechanism, float]:
        """The sampler and the mechanism of this many bands, and the error of the prefix sums."""
        strategy = BandedToeplitz.optimal(bands, steps, momentum)
        sampler: Sampler = ordinary
        mechanism: AnyMechanism = Gaussian()
        if bands > 1:
            sampler = RandomCyclicPoisson(num_examples, expected_batch_size, bands)
            mechanism = Correlated(strategy)
        noise = calibrate_noise_multiplier(
            epsilon=epsilon, delta=delta, sampler=sampler, num_steps=steps, mechanism=mechanism
        ).noise_multiplier
        return sampler, mechanism, noise * prefix_sum_error(strategy, momentum=momentum)

    sampler, mechanism, _ = settings(_best(lambda bands: settings(bands)[2], most))
    return Plan.calibrate(
        sampler=sampler,
        clip=clip,
        num_steps=steps,
        epsilon=epsilon,
        delta=delta,
        mechanism=mechanism,
    )


def _best(error: Any, most: int) -> int:
    """Returns the smallest number of bands, of a geometric grid, that has about the least error."""
    # One band is always tried, so that the result is never worse than independent noise.
    tried = [1]
    # The error first falls and then rises with the number of bands.
    while tried[-1] < most and error(tried[-1]) <= 1.02 * min(map(error, tried)):
        tried.append(min(max(tried[-1] + 1, math.ceil(tried[-1] * RATIO)), most))
    largest = min(map(error, tried)) * (1 + SMALLEST_GAIN)
    return next(bands for bands in tried if error(bands) <= largest)
