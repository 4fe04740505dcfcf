"""Calibration: the least noise, the most steps or the largest batch within a privacy budget.

Epsilon was evaluated at every value that is returned, is at most the target, and is returned too.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import dp_accounting

from dpoptax import _validate
from dpoptax._foreign_names import answer_foreign_names
from dpoptax.accounting import _search as search
from dpoptax.accounting._budget import Budget, first_log_noise, sampling_rate, spread
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.relations import Relation
from dpoptax.samplers import Poisson, Sampler

# With less noise there is no guarantee worth the name.
SMALLEST_NOISE_MULTIPLIER = 0.1
# Ends of the searches, beyond any use.
LARGEST_NOISE_MULTIPLIER = 1e9
MAX_STEPS = 10**9
# How much coarser than usual the grid is while searching; about that much faster. A coarse grid
# overstates epsilon a little, so that the answer is improved on the usual grid at the end.
SEARCH_COARSENING = 8.0


class CalibratedNoise(NamedTuple):
    """The noise multiplier that was found, and its epsilon, which is at most the target."""

    noise_multiplier: float
    epsilon: float


class CalibratedSteps(NamedTuple):
    """The number of steps that was found, and its epsilon, which is at most the target."""

    num_steps: int
    epsilon: float


class CalibratedBatchSize(NamedTuple):
    """The batch size that was found, and its epsilon, which is at most the target."""

    batch_size: int
    epsilon: float


@answer_foreign_names
def calibrate_noise_multiplier(
    *,
    epsilon: float,
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
        epsilon: the target, positive.
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
        The noise multiplier, at least 0.1, and its epsilon.

    Raises:
        TypeError: a count is not whole, or a number is not real; or both or none of num_steps and
            epochs are given.
        ValueError: a number is out of range; or no noise up to 1e9 reaches the target, with the
            epsilon that is reached.

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
    budget = Budget(epsilon, delta, relation, earlier, mechanism)
    _validate.warn_of_large_delta(budget.delta, sampler.num_examples, sampler.unit)

    def cost(log_noise: float, coarsening: float = 1.0) -> float:
        return budget.cost(sampler, math.exp(log_noise), steps, coarsening)

    coarse = functools.lru_cache(
        lambda log_noise: budget.excess(cost(log_noise, SEARCH_COARSENING))
    )
    # Epsilon is about a power of the noise, so that the search is over its logarithm.
    lowest, highest = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(LARGEST_NOISE_MULTIPLIER)
    guess = min(max(first_log_noise(budget, sampler, steps), lowest), highest)
    root = search.smallest_root(coarse, guess, lowest, highest)
    if math.isinf(root) and (spent := cost(highest)) > budget.epsilon:
        raise budget.out_of_reach(
            f"even a noise multiplier of {LARGEST_NOISE_MULTIPLIER:g} costs {spent:.4g}. Take a "
            "larger epsilon, fewer steps, or a larger max_batch_size: overflow is paid from delta. "
            "Earlier releases count too."
        )
    root = min(root, highest)
    # The slope tells how much noise the coarse grid's excess costs.
    slope = (coarse(root + 0.02) - coarse(root)) / 0.02
    # The coarse grid overstates epsilon, so its root is feasible but for rounding.
    while (spent := cost(root)) > budget.epsilon:
        root += search.TOLERANCE
    # At the end of the range nothing can be improved; a flat curve has no Newton step.
    if root == lowest or slope >= 0:
        return CalibratedNoise(math.exp(root), spent)
    log_noise, spent = _less_noise(budget, cost, (root, spent), lowest, slope)
    return CalibratedNoise(math.exp(log_noise), spent)


def with_noise_for(
    sampler: Sampler, found: CalibratedNoise, budget: Budget, num_steps: int
) -> CalibratedNoise:
    """Returns noise for a sampler that costs a little more than the one it was found for."""
    log_noise = math.log(found.noise_multiplier)
    while (spent := budget.cost(sampler, math.exp(log_noise), num_steps)) > budget.epsilon:
        # Epsilon falls at least as fast as the noise grows, so one step is enough as a rule.
        log_noise += math.log(spent / budget.epsilon) + search.TOLERANCE / 2
    return CalibratedNoise(math.exp(log_noise), spent)


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
        if refined_cost <= budget.epsilon:
            return refined, refined_cost
        beyond = budget.excess(refined_cost)
        refined += (root - refined) * beyond / (beyond - rest) + search.TOLERANCE / 2
    return feasible


@answer_foreign_names
def calibrate_num_steps(
    *,
    epsilon: float,
    delta: float,
    sampler: Sampler,
    noise_multiplier: float,
    relation: Relation | None = None,
) -> CalibratedSteps:
    """Finds the largest number of steps that costs at most `epsilon`.

    Args:
        epsilon: the target, positive.
        delta: strictly between 0 and 1, and well below 1 / num_examples.
        sampler: the sampler that will run.
        noise_multiplier: positive.
        relation: which data sets are neighbours; None for the sampler's own relation, which is
            `replace_special` for `Shuffled` and `CyclicPoisson`.

    Returns:
        The number of steps, at most 1e9, and its epsilon.

    Raises:
        TypeError: a number is not real.
        ValueError: a number is out of range; or a single step exceeds the target, with its epsilon.

    Warns:
        UserWarning: delta is above 1 / num_examples.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> num_steps, achieved = calibrate_num_steps(
        ...     epsilon=1.0, delta=1e-5, sampler=Poisson(60_000, 128), noise_multiplier=1.1
        ... )
        >>> abs(num_steps / 11_673 - 1) < 1e-3, 0.999 < achieved <= 1.0
        (True, True)
    """
    budget = Budget(epsilon, delta, relation)
    _validate.warn_of_large_delta(budget.delta, sampler.num_examples, sampler.unit)
    noise = _validate.positive("noise_multiplier", noise_multiplier)

    @functools.lru_cache
    def cost(num_steps: int, coarsening: float = 1.0) -> float:
        return budget.cost(sampler, noise, num_steps, coarsening)

    guess = (budget.gaussian_mu() / (sampling_rate(sampler) * spread(noise))) ** 2
    # First on the coarse grid, whose answer is a good first guess on the usual one.
    guess = budget.largest(lambda steps: cost(steps, SEARCH_COARSENING), guess, MAX_STEPS)
    num_steps = budget.largest(cost, guess, MAX_STEPS)
    if num_steps == 0:
        raise budget.out_of_reach(
            f"one step at noise multiplier {noise:g} costs {cost(1):.4g}. Take more noise or a "
            "smaller batch."
        )
    return CalibratedSteps(num_steps, cost(num_steps))


@answer_foreign_names
def calibrate_batch_size(
    *,
    epsilon: float,
    delta: float,
    num_examples: int,
    noise_multiplier: float,
    num_steps: int | None = None,
    epochs: float | None = None,
    make_sampler: Callable[[int, int], Sampler] = Poisson,
    relation: Relation | None = None,
) -> CalibratedBatchSize:
    """Finds the largest batch that costs at most `epsilon`, for fixed steps or fixed epochs.

    Args:
        epsilon: the target, positive.
        delta: strictly between 0 and 1, and well below 1 / num_examples.
        num_examples: how many examples there are.
        noise_multiplier: positive.
        num_steps: how many steps will run, whatever the batch size; or
        epochs: how often each example takes part on average. Give one of the two.
        make_sampler: makes a sampler from a number of examples and a whole batch size.
        relation: which data sets are neighbours; None for the sampler's own relation, which is
            `replace_special` for `Shuffled` and `CyclicPoisson`.

    Returns:
        The batch size, a whole number, and its epsilon.

    Raises:
        TypeError: a number has the wrong type; or both or none of num_steps and epochs are given.
        ValueError: a number is out of range; or a batch of one example exceeds the target, with its
            epsilon.

    Warns:
        UserWarning: delta is above 1 / num_examples.

    Example:
        >>> batch_size, achieved = calibrate_batch_size(
        ...     epsilon=1.0, delta=1e-5, num_examples=60_000, noise_multiplier=1.1, num_steps=9380
        ... )
        >>> batch_size, 0.99 < achieved <= 1.0
        (142, True)
    """
    budget = Budget(epsilon, delta, relation)
    num_examples = _validate.num_examples(num_examples)
    _validate.warn_of_large_delta(budget.delta, num_examples, make_sampler(num_examples, 1).unit)
    noise = _validate.positive("noise_multiplier", noise_multiplier)
    _validate.epochs_or_steps(epochs, num_steps)

    def steps_of(batch_size: int) -> int:
        if epochs is None:
            return _validate.count("num_steps", num_steps)
        return _validate.steps_of_epochs(epochs, num_examples, batch_size)

    # The sampler changes with the size, so that each evaluation starts from the sampler.
    @functools.lru_cache
    def cost(batch_size: int) -> float:
        return budget.cost(make_sampler(num_examples, batch_size), noise, steps_of(batch_size))

    rate = budget.gaussian_mu() / spread(noise)
    # At fixed epochs the number of steps falls as the batch grows, so mu grows with its root only.
    if epochs is None:
        guess = num_examples * rate / math.sqrt(steps_of(1))
    else:
        guess = num_examples * rate**2 / _validate.positive("epochs", epochs)
    batch_size = budget.largest(cost, guess, num_examples)
    if batch_size == 0:
        raise budget.out_of_reach(
            f"{steps_of(1)} steps with one example each cost {cost(1):.4g}. Take more noise or "
            "fewer steps."
        )
    return CalibratedBatchSize(batch_size, cost(batch_size))
