"""Subsampled Gaussian mechanism: the privacy loss of one step, from a closed form.

Let q be the sampling rate, and let one example move the sum by s, in units of the noise. The pair
(1 - q) N(0, 1) + q N(s, 1) against N(0, 1) has, for epsilon > log(1 - q), the privacy profile

    delta(epsilon) = q delta_G(log(1 + (exp(epsilon) - 1) / q))                       (1)

where delta_G is the profile of N(s, 1) against N(0, 1) (Balle, Barthe, Gaboardi 2018,
arXiv:1807.01647). dp-accounting's connect-the-dots puts the profile on a grid.

dp-accounting can do this for Poisson sampling itself, but one grid point at a time, which is about
thirty times slower. It has no distribution for batches without replacement, and its Rényi
accountant assumes that noise is relative to the sensitivity there, which is twice the clip bound.
"""

import math

import numpy as np
import scipy.special
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from dpoptax._dp_events import LimitedPoissonDpEvent
from dpoptax.accounting._dp_accounting_compat import (
    GridLoss,
    distribution,
    from_deltas,
    grid_losses,
)

# The probability of the losses of one step beyond the grid, which count as infinite. A million
# steps add 1e-16 to delta.
TAIL = 1e-22


def poisson(rate: float, noise_multiplier: float, grid_step: float) -> PrivacyLossDistribution:
    """Returns the loss of one noisy sum over a Poisson batch, under add_or_remove_one.

    An upper bound. The rate must be at most one half; above, rounding errors grow.
    """
    shift = 1 / noise_multiplier
    smallest = -(shift**2) / 2 - shift * standard_deviations(TAIL)
    lowest = math.floor(math.log1p(rate * math.expm1(smallest)) / grid_step)
    highest = math.ceil(_largest_loss(rate, shift) / grid_step)
    epsilons = grid_step * np.arange(lowest, highest + 1)
    removed = from_deltas(grid_step, lowest, highest, profile(epsilons, rate, shift))
    # In the other direction the loss has the opposite sign and exp(-loss) times the probability.
    # It is infinite where the loss in this direction is below the grid.
    added = removed.probabilities * np.exp(-epsilons)
    return distribution(grid_step, removed, GridLoss(added[::-1], -highest, TAIL))


def of_limited_batch(
    event: LimitedPoissonDpEvent, loss: PrivacyLossDistribution, grid_step: float
) -> PrivacyLossDistribution:
    """Returns the loss for a batch of limited size, from `loss` for one of any size.

    An upper bound, under add_or_remove_one. The event says why.
    """
    removed, added = grid_losses(loss)
    # A loss that is larger by a constant c lies between two points of the grid. In the convex order
    # of the likelihood ratio it is below both of them, with these weights.
    whole, part = divmod(event.log_ratio(), grid_step)
    upper = math.expm1(-part) / math.expm1(-grid_step)
    probs = np.append((1 - upper) * removed.probabilities, 0.0)
    probs[1:] += upper * removed.probabilities
    crowding = event.probability_of_crowding()
    place = math.ceil(event.loss_if_crowded() / grid_step) - added.lowest
    sizes = (0, max(place + 1 - len(added.probabilities), 0))
    mixed = np.pad((1 - crowding) * added.probabilities, sizes)
    mixed[place] += crowding
    return distribution(
        grid_step,
        GridLoss(probs, removed.lowest + int(whole), removed.infinite),
        GridLoss(mixed, added.lowest, (1 - crowding) * added.infinite),
    )


def poisson_replacing(
    rate: float, noise_multiplier: float, grid_step: float
) -> PrivacyLossDistribution:
    """Returns the loss of one noisy sum over a Poisson batch, where one example may be replaced.

    An upper bound. The worst pair is (1 - q) N(0, 1) + q N(s, 1) against the same with -s, whose
    loss grows with the output. So the profile is the difference of the probabilities above the
    output x at which the loss is epsilon (Zhu, Dong and Wang 2022, arXiv:2106.08567).
    """
    shift = 1 / noise_multiplier
    furthest = shift + standard_deviations(TAIL)
    last = math.ceil(float(_replacing_loss(np.array([furthest]), rate, shift)[0]) / grid_step)
    epsilons = grid_step * np.arange(last + 1)
    points = np.linspace(0.0, 1.01 * furthest, 20_000)
    outputs = np.interp(epsilons, _replacing_loss(points, rate, shift), points)
    # Newton's method. The profile is flat in x at the solution, so errors of x are squared.
    for _ in range(3):
        joined = rate * np.exp(np.stack([outputs, -outputs]) * shift - shift**2 / 2)
        slopes = shift * (joined / (1 - rate + joined)).sum(axis=0)
        outputs = outputs + (epsilons - _replacing_loss(outputs, rate, shift)) / slopes
    joins = scipy.special.ndtr(shift - outputs) - np.exp(
        epsilons + scipy.special.log_ndtr(-shift - outputs)
    )
    with np.errstate(divide="ignore"):  # the logarithm of zero, at epsilon zero
        growth = epsilons + np.log(-np.expm1(-epsilons))
    stays_out = -np.exp(scipy.special.log_ndtr(-outputs) + growth)
    above = np.clip(rate * joins + (1 - rate) * stays_out, 0.0, 1.0)
    return symmetric(above, grid_step)


def _replacing_loss(outputs: np.ndarray, rate: float, shift: float) -> np.ndarray:
    exponents = np.stack([outputs, -outputs]) * shift - shift**2 / 2 + math.log(rate)
    stays_out = math.log1p(-rate) if rate < 1 else -math.inf
    first, second = np.logaddexp(stays_out, exponents)
    return first - second


def symmetric(above: np.ndarray, grid_step: float) -> PrivacyLossDistribution:
    """Returns the loss with this profile on the grid from zero on, the same in both directions.

    Below zero, delta(-epsilon) = 1 - exp(-epsilon) + exp(-epsilon) delta(epsilon).
    """
    epsilons = grid_step * np.arange(len(above))
    below = -np.expm1(-epsilons) + np.exp(-epsilons) * above
    deltas = np.concatenate([below[:0:-1], above])
    last = len(above) - 1
    return distribution(grid_step, from_deltas(grid_step, -last, last, deltas))


def without_replacement(
    rate: float, noise_multiplier: float, grid_step: float
) -> PrivacyLossDistribution:
    """Returns the loss of one noisy sum over a full batch, where one example may be replaced.

    An upper bound; `rate` is batch_size / num_examples. Replacing an example moves the sum by twice
    the clip bound if it is in the batch. The loss is symmetric, and follows from (1).
    """
    shift = 2 / noise_multiplier
    last = math.ceil(_largest_loss(rate, shift) / grid_step)
    epsilons = grid_step * np.arange(last + 1)
    return symmetric(profile(epsilons, rate, shift), grid_step)


def standard_deviations(tail: float) -> float:
    """Returns where the upper tail of a standard normal has this probability."""
    return float(-scipy.special.ndtri(tail))


def _largest_loss(rate: float, shift: float) -> float:
    """An epsilon beyond which the profile is below TAIL."""
    gaussian = shift**2 / 2 + shift * standard_deviations(TAIL)
    return float(np.logaddexp(np.log1p(-rate), math.log(rate) + gaussian)) if rate < 1 else gaussian


def profile(epsilons: np.ndarray, rate: float, shift: float) -> np.ndarray:
    """Returns equation (1), and 1 - exp(epsilon) below log(1 - q)."""
    inner = np.full(len(epsilons), -np.inf)
    growth = np.expm1(np.minimum(epsilons, 1.0)) / rate
    beyond = growth > -1
    inner[beyond] = np.log1p(growth[beyond])
    # For large epsilons exp(epsilon) may overflow, so log(1 + (exp(epsilon) - 1) / q) is written
    # as epsilon - log(q) + log(1 - (1 - q) exp(-epsilon)).
    large = epsilons > 1
    inner[large] = epsilons[large] + np.log1p(-(1 - rate) * np.exp(-epsilons[large]))
    inner[large] -= math.log(rate)
    first = scipy.special.ndtr(-(inner / shift - shift / 2))
    second = np.exp(inner + scipy.special.log_ndtr(-(inner / shift + shift / 2)))
    deltas = rate * np.clip(first - second, 0.0, 1.0)
    return np.where(beyond, deltas, -np.expm1(np.minimum(epsilons, 0.0)))
