"""Calibration of the length and the batch size: the most steps, the largest batch within a budget.

The cost was evaluated at every value that is returned, and is within the budget.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from dpoptax import _validate
from dpoptax._foreign_names import answer_foreign_names
from dpoptax.accounting._attack_risk import AttackRisk
from dpoptax.accounting._budget import Budget, sampling_rate, spread
from dpoptax.accounting._calibrate import SEARCH_COARSENING
from dpoptax.relations import Relation
from dpoptax.samplers import Poisson, Sampler

# The end of the search, beyond any use.
MAX_STEPS = 10**9


class CalibratedSteps(NamedTuple):
    """The number of steps that was found, and its epsilon, which is at most the one asked for."""

    num_steps: int
    epsilon: float


class CalibratedBatchSize(NamedTuple):
    """The batch size that was found, and its epsilon, which is at most the one asked for."""

    batch_size: int
    epsilon: float


@answer_foreign_names
def calibrate_num_steps(
    *,
    epsilon: float | None = None,
    risk: AttackRisk | None = None,
    delta: float,
    sampler: Sampler,
    noise_multiplier: float,
    relation: Relation | None = None,
) -> CalibratedSteps:
    """Finds the largest number of steps that costs at most `epsilon`.

    Args:
        epsilon: the target, positive; or
        risk: what an attack may reach at most: `Advantage`, `TruePositiveRate`, `PosteriorBelief`
            or `Reconstruction`. Give one of the two.
        delta: strictly between 0 and 1, and well below 1 / num_examples.
        sampler: the sampler that will run.
        noise_multiplier: positive.
        relation: which data sets are neighbours; None for the sampler's own relation, which is
            `replace_special` for `Shuffled` and `CyclicPoisson`.

    Returns:
        The number of steps, at most 1e9, and its epsilon.

    Raises:
        TypeError: a number is not real; or both or none of epsilon and risk are given.
        ValueError: a number is out of range; or a single step exceeds the target, with its cost.

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
    budget = Budget(epsilon, delta, relation, risk=risk)
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
    return CalibratedSteps(num_steps, budget.epsilon_of(cost(num_steps), sampler, noise, num_steps))


@answer_foreign_names
def calibrate_batch_size(
    *,
    epsilon: float | None = None,
    risk: AttackRisk | None = None,
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
        epsilon: the target, positive; or
        risk: what an attack may reach at most: `Advantage`, `TruePositiveRate`, `PosteriorBelief`
            or `Reconstruction`. Give one of the two.
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
        TypeError: a number has the wrong type; or of two alternatives, both or none were given.
        ValueError: a number is out of range; or a batch of one example exceeds the target, with its
            cost.

    Warns:
        UserWarning: delta is above 1 / num_examples.

    Example:
        >>> batch_size, achieved = calibrate_batch_size(
        ...     epsilon=1.0, delta=1e-5, num_examples=60_000, noise_multiplier=1.1, num_steps=9380
        ... )
        >>> batch_size, 0.99 < achieved <= 1.0
        (142, True)
    """
    budget = Budget(epsilon, delta, relation, risk=risk)
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
    sampler, steps = make_sampler(num_examples, batch_size), steps_of(batch_size)
    return CalibratedBatchSize(
        batch_size, budget.epsilon_of(cost(batch_size), sampler, noise, steps)
    )
