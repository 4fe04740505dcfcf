"""A target epsilon in; the least noise, the most steps or the largest batch that keeps it out.

Every value returned is one at which epsilon was evaluated and found at or below the target, and
comes with that epsilon.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import scipy.optimize
import scipy.stats

from dpoptax import _validate
from dpoptax.accounting import _search as search
from dpoptax.accounting._epsilon import event_epsilon, run_event
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers import Poisson, Sampler
from dpoptax.schedules import extremes

# Noise below this gives no guarantee worth the name.
SMALLEST_NOISE_MULTIPLIER = 0.1
LARGEST_NOISE_MULTIPLIER = 1e9
MOST_STEPS = 10**9
# How much coarser than usual the grid of the search is: about that much faster.
SEARCH_COARSENING = 8.0


class Calibrated(NamedTuple):
    """What was found, and what it costs.

    Attributes:
        value: the noise multiplier, the number of steps or the batch size.
        epsilon: at that value, at most the target.
    """

    value: float
    epsilon: float


def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampler: Sampler,
    num_steps: int,
    relation: Relation = "add_or_remove_one",
) -> Calibrated:
    """Finds the least noise multiplier, to a relative 1e-3, that costs at most `epsilon`.

    Args:
        epsilon: the target, positive.
        delta: strictly between 0 and 1, well below 1 / num_examples.
        sampler: the sampler that will run.
        num_steps: how many steps will run, at least 1.
        relation: which data sets count as neighbours.

    Returns:
        The noise multiplier, at least 0.1, and the epsilon that it costs.

    Raises:
        TypeError: a count that is not whole, a number that is not real.
        ValueError: a number out of range, or a target that no noise up to 1e9 reaches, with the
            epsilon that is reached.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> noise_multiplier, achieved = calibrate_noise_multiplier(
        ...     epsilon=3.0, delta=1e-5, sampler=Poisson(60_000, 128), num_steps=9375
        ... )
        >>> round(noise_multiplier, 2), 2.99 < achieved <= 3.0
        (0.67, True)
    """
    target = _validate.positive("epsilon", epsilon)
    num_steps = _validate.count("num_steps", num_steps)
    delta = _validate.open_unit("delta", delta)
    parsed = parse_relation(relation)

    def achieved(log_noise: float, coarsening: float = 1.0) -> float:
        event = run_event(sampler, math.exp(log_noise), num_steps, parsed)
        return event_epsilon(event, delta=delta, relation=parsed, coarsening=coarsening)

    # The search runs on a coarse grid, which overstates epsilon a little: its root is feasible.
    coarse = functools.lru_cache(
        lambda log_noise: _excess(achieved(log_noise, SEARCH_COARSENING), target)
    )
    lowest, highest = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(LARGEST_NOISE_MULTIPLIER)
    _, size = extremes(sampler.expected_batch_size)
    guess = _first_guess(target, delta, size / sampler.num_examples, num_steps)
    root = search.smallest_root(coarse, min(max(guess, lowest), highest), lowest, highest)
    if math.isinf(root) and (spent := achieved(highest)) > target:
        raise ValueError(
            f"epsilon = {target:g} at delta = {delta:g} is out of reach: even a noise multiplier "
            f"of {LARGEST_NOISE_MULTIPLIER:g} costs {spent:.4g}. Take a larger epsilon or delta, "
            "or a larger max_batch_size, whose overflow is paid from delta."
        )
    root = min(root, highest)
    slope = (coarse(root + 0.02) - coarse(root)) / 0.02
    while (spent := achieved(root)) > target:
        root += search.TOLERANCE
    if root > lowest and slope < 0:
        # Newton and then the secant, on the fine grid, take back what the coarse one overstated.
        rest = _excess(spent, target)
        refined = root - rest / slope + search.TOLERANCE / 2
        for _ in range(3):
            if not lowest < refined < root:
                break
            cost = achieved(refined)
            if cost <= target:
                return Calibrated(math.exp(refined), cost)
            beyond = _excess(cost, target)
            refined += (root - refined) * beyond / (beyond - rest) + search.TOLERANCE / 2
    return Calibrated(math.exp(root), spent)


def calibrate_num_steps(
    *,
    epsilon: float,
    delta: float,
    sampler: Sampler,
    noise_multiplier: float,
    relation: Relation = "add_or_remove_one",
) -> Calibrated:
    """Finds the largest number of steps that costs at most `epsilon`.

    Args:
        epsilon: the target, positive.
        delta: strictly between 0 and 1, well below 1 / num_examples.
        sampler: the sampler that will run.
        noise_multiplier: positive.
        relation: which data sets count as neighbours.

    Returns:
        The number of steps, at most 1e9, and the epsilon that they cost.

    Raises:
        TypeError: a number that is not real.
        ValueError: a number out of range, or a target that a single step exceeds, with the epsilon
            that it costs.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> num_steps, achieved = calibrate_num_steps(
        ...     epsilon=1.0, delta=1e-5, sampler=Poisson(60_000, 128), noise_multiplier=1.1
        ... )
        >>> abs(num_steps / 11_673 - 1) < 1e-3, 0.999 < achieved <= 1.0
        (True, True)
    """
    target = _validate.positive("epsilon", epsilon)
    delta = _validate.open_unit("delta", delta)
    noise = _validate.positive("noise_multiplier", noise_multiplier)
    parsed = parse_relation(relation)

    @functools.lru_cache
    def achieved(num_steps: int, coarsening: float = 1.0) -> float:
        event = run_event(sampler, noise, num_steps, parsed)
        return event_epsilon(event, delta=delta, relation=parsed, coarsening=coarsening)

    _, size = extremes(sampler.expected_batch_size)
    spread = size / sampler.num_examples * math.sqrt(math.expm1(min(noise**-2, 700.0)))
    guess = (_gaussian_shift(target, delta) / spread) ** 2
    guess = search.largest_feasible(
        lambda steps: _excess(achieved(steps, SEARCH_COARSENING), target), guess, MOST_STEPS
    )
    steps = search.largest_feasible(
        lambda steps: _excess(achieved(steps), target), guess, MOST_STEPS
    )
    if steps == 0:
        raise ValueError(
            f"epsilon = {target:g} at delta = {delta:g} is out of reach: one step at noise "
            f"multiplier {noise:g} costs {achieved(1):.4g}. Take more noise or a smaller batch."
        )
    return Calibrated(steps, achieved(steps))


def calibrate_batch_size(
    *,
    epsilon: float,
    delta: float,
    num_examples: int,
    noise_multiplier: float,
    num_steps: int | None = None,
    epochs: float | None = None,
    make_sampler: Callable[[int, int], Sampler] = Poisson,
    relation: Relation = "add_or_remove_one",
) -> Calibrated:
    """Finds the largest batch that costs at most `epsilon`, at fixed steps or at fixed epochs.

    Args:
        epsilon: the target, positive.
        delta: strictly between 0 and 1, well below 1 / num_examples.
        num_examples: how many examples there are.
        noise_multiplier: positive.
        num_steps: how many steps will run, whatever the batch; or
        epochs: how often each example takes part on average. Give one of the two.
        make_sampler: makes a sampler of a number of examples and a whole batch size.
        relation: which data sets count as neighbours.

    Returns:
        The batch size, whole, and the epsilon that it costs.

    Raises:
        TypeError: a number of the wrong kind; both or none of num_steps and epochs.
        ValueError: a number out of range, or a target that a batch of one example exceeds, with
            the epsilon that it costs.

    Example:
        >>> batch_size, achieved = calibrate_batch_size(
        ...     epsilon=1.0, delta=1e-5, num_examples=60_000, noise_multiplier=1.1, num_steps=9380
        ... )
        >>> batch_size, 0.99 < achieved <= 1.0
        (142, True)
    """
    target = _validate.positive("epsilon", epsilon)
    delta = _validate.open_unit("delta", delta)
    num_examples = _validate.num_examples(num_examples)
    noise = _validate.positive("noise_multiplier", noise_multiplier)
    parsed = parse_relation(relation)
    _validate.epochs_or_steps(epochs, num_steps)

    @functools.lru_cache
    def achieved(batch_size: int) -> float:
        sampler = make_sampler(num_examples, batch_size)
        event = run_event(sampler, noise, steps_of(batch_size), parsed)
        return event_epsilon(event, delta=delta, relation=parsed)

    def steps_of(batch_size: int) -> int:
        if epochs is None:
            return _validate.count("num_steps", num_steps)
        return _validate.steps_of_epochs(epochs, num_examples, batch_size)

    rate = _gaussian_shift(target, delta) / math.sqrt(math.expm1(min(noise**-2, 700.0)))
    if epochs is None:
        guess = num_examples * rate / math.sqrt(steps_of(1))
    else:
        guess = num_examples * rate**2 / _validate.positive("epochs", epochs)
    size = search.largest_feasible(
        lambda size: _excess(achieved(size), target), guess, num_examples
    )
    if size == 0:
        raise ValueError(
            f"epsilon = {target:g} at delta = {delta:g} is out of reach: {steps_of(1)} steps with "
            f"one example each cost {achieved(1):.4g}. Take more noise or fewer steps."
        )
    return Calibrated(size, achieved(size))


def _excess(achieved: float, target: float) -> float:
    """At most zero where the target is kept."""
    return math.log(max(achieved, 1e-12) / target) if achieved < math.inf else 1e3


def _first_guess(epsilon: float, delta: float, rate: float, num_steps: int) -> float:
    """The logarithm of the noise at which the central limit of many small steps meets epsilon.

    mu = rate * sqrt(num_steps * (exp(1 / noise**2) - 1)) (Bu et al. 2020, arXiv:1911.11607).
    """
    shift = _gaussian_shift(epsilon, delta)
    return -0.5 * math.log(math.log1p((shift / rate) ** 2 / num_steps))


def _gaussian_shift(epsilon: float, delta: float) -> float:
    """The mu at which a Gaussian mechanism has that epsilon and delta."""
    normal = scipy.stats.norm

    def excess_delta(mu: float) -> float:
        gap = -epsilon / mu
        tail = math.exp(min(epsilon + normal.logcdf(gap - mu / 2), 0.0))
        return float(normal.cdf(gap + mu / 2) - tail - delta)

    return float(scipy.optimize.brentq(excess_delta, delta, epsilon + 50.0, xtol=1e-15))
