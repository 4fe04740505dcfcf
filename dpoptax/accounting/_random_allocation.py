"""Random allocation: the privacy loss of one round in which an example joins one of t noisy sums.

Let one example move a sum by 1 / noise_multiplier, in units of the noise. With the example, the
outputs of a round have the distribution P = (1/t) sum_i N(e_i / noise_multiplier, I), and without
it Q = N(0, I). The ratio of the two densities is the mean of t independent lognormals,

    Y = (1/t) sum_i X_i,   X_i = exp(z_i / noise_multiplier - 1 / (2 noise_multiplier^2))

with standard normal z_i under Q (Chua et al. 2024, arXiv:2412.16802; Feldman and Shenfeld 2025,
arXiv:2502.08202). Both privacy profiles are expectations of convex functions of Y:

    removed:  delta(epsilon) = E_Q max(Y - exp(epsilon), 0)
    added:    delta(epsilon) = E_Q max(1 - exp(epsilon) Y, 0)

So a distribution that is larger in the convex order gives upper bounds of both.
`_lognormal_sums.py` computes one.

What exceeds the last grid point would be cut. By max(a + b, 0) <= max(a, 0) + max(b, 0), the cut
changes the profile by at most the mean of what is cut. This mean is the probability under P of a
privacy loss that counts as infinite.
"""

import functools
import math

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from dpoptax._dp_events import TruncatedRandomAllocationDpEvent
from dpoptax.accounting import _lognormal_sums as sums
from dpoptax.accounting import _subsampled_gaussian as subsampled
from dpoptax.accounting._dp_accounting_compat import (
    GridLoss,
    distribution,
    grid_losses,
)

# A bound on the relative rounding error of the probabilities: sums of up to 1e7 positive terms.
ROUNDING = 1e-8
# With less noise, a round costs too much to be of use, and lognormals soon overflow. So
# the round is then accounted as if the step were known.
SMALLEST_NOISE = 0.25
# How a loss is shared between the two halves of a replacement, as fractions of epsilon.
SHARES = (0.4, 0.45, 0.5, 0.55, 0.6)


def random_allocation(
    num_steps: int, noise_multiplier: float, grid_step: float, *, num_full: int = 0
) -> PrivacyLossDistribution:
    """Returns the loss of one round for an example that is added or removed; an upper bound.

    Args:
        num_steps: the number of noisy sums of the round; the example joins one of them.
        noise_multiplier: standard deviation of the noise on a sum, divided by the clip bound.
        grid_step: of the losses.
        num_full: in so many steps the example displaces another one, and moves the sum twice.
    """
    removed, added = _losses(num_steps, noise_multiplier, grid_step, num_full)
    return distribution(grid_step, removed, added)


def truncated_random_allocation(
    event: TruncatedRandomAllocationDpEvent, grid_step: float
) -> PrivacyLossDistribution:
    """Returns the loss of a round with batches of limited size, under add_or_remove_one.

    An upper bound. Fix the steps of the other examples, which are the same on both neighbours: they
    say which batches are full. An adversary who knows them sees a mixture over the number of full
    batches. The sizes of the batches are negatively associated (Joag-Dev and Proschan 1983), so
    that at least j of t are full with probability at most (t choose j) p^j.
    """
    steps, noise = event.num_steps, event.noise_multiplier
    full = event.probability_of_full()
    at_least = [1.0]  # the probability that at least j batches are full
    while at_least[-1] > subsampled.TAIL and len(at_least) <= min(sums.MAX_FULL, steps):
        number = len(at_least)
        log_bound = _log_binomial(steps, number) + number * math.log(max(full, 1e-300))
        at_least.append(min(math.exp(min(log_bound, 0.0)), at_least[-1]))
    # More full batches cost more, so the last case stands for all batches.
    loss = random_allocation(steps, noise / 2, grid_step)
    for number in reversed(range(len(at_least) - 1)):
        case = random_allocation(steps, noise, grid_step, num_full=number)
        loss = loss.compute_mixture(case, at_least[number + 1] / at_least[number])
    return loss


def random_allocation_replacing(
    num_steps: int, noise_multiplier: float, grid_step: float
) -> PrivacyLossDistribution:
    """Returns the loss of one round for an example that is replaced by another; an upper bound.

    The outputs with the old example are P, those with the new one are P', and without either they
    are Q. For every a, with H the hockey-stick divergence at exp(epsilon),

        H(epsilon, P, P') <= H(a, P, Q) + exp(a) H(epsilon - a, Q, P').

    We take the best of several shares a. Both directions have this bound. It is nearly tight where
    a round costs little, and then half as noisy as adding.
    """
    if noise_multiplier < SMALLEST_NOISE:
        return _known_step(noise_multiplier / 2, grid_step)
    removed, added = _losses(num_steps, noise_multiplier, grid_step, 0)
    last = max(removed.lowest + len(removed.probabilities), added.lowest + len(added.probabilities))
    epsilons = grid_step * np.arange(2 * last + 1)
    bounds = [
        _delta(removed, share * epsilons, grid_step)
        + np.exp(share * epsilons) * _delta(added, (1 - share) * epsilons, grid_step)
        for share in SHARES
    ]
    # Nor does it cost more than if the step were known.
    bounds.append(subsampled.profile(epsilons, 1.0, 2 / noise_multiplier))
    above = _symmetric_envelope(np.exp(epsilons), np.minimum(np.min(bounds, axis=0), 1.0))
    return subsampled.symmetric(above, grid_step)


def usual_grid_step(num_steps: int, noise_multiplier: float) -> float:
    """Returns the step of losses that suits one round alone: a twentieth of their deviation."""
    return min(math.sqrt(chi_squared(num_steps, noise_multiplier)) / 20, 1e-3)


def chi_squared(num_steps: int, noise_multiplier: float) -> float:
    """Returns the variance of Y, which is about that of the loss where a round costs little."""
    return math.expm1(min(noise_multiplier**-2, 300.0)) / num_steps


def largest_loss(num_steps: int, noise_multiplier: float) -> float:
    """Returns a loss that is exceeded with negligible probability: ten standard deviations."""
    exponent = noise_multiplier**-2 / 2 + 10 / noise_multiplier
    return float(np.logaddexp(exponent - math.log(num_steps), 0.0))


@functools.lru_cache(maxsize=16)
def _losses(
    num_steps: int, noise_multiplier: float, grid_step: float, num_full: int
) -> tuple[GridLoss, GridLoss]:
    """The loss of one round on the grid when the example is removed, and when it is added."""
    if noise_multiplier < SMALLEST_NOISE:
        largest_move = 2 if num_full else 1
        return grid_losses(_known_step(noise_multiplier / largest_move, grid_step))
    # A search on a coarse grid of losses does not need a fine grid here either.
    coarse = grid_step > 2 * usual_grid_step(num_steps, noise_multiplier)
    spacing = 2 * sums.SPACING if coarse else sums.SPACING
    values, probs, cut = sums.sum_with_full(num_steps, noise_multiplier, spacing, num_full)
    values, cut = values / num_steps, cut / num_steps
    first, last = values[1], values[-1]
    lowest = math.floor(math.log(first) / grid_step)
    highest = math.ceil(math.log(last) / grid_step)
    losses = grid_step * np.arange(lowest, highest + 1)
    at_zero, *on_grid = sums.split(values, probs, np.concatenate([[0.0], np.exp(losses)]))[0]
    added = np.array(on_grid) * (1 + ROUNDING)
    # Under P a value y of Y is y times as likely, and its loss is log(y).
    removed = added * np.exp(losses)
    return (
        GridLoss(removed, lowest, cut * (1 + ROUNDING)),
        GridLoss(added[::-1], -highest, at_zero * (1 + ROUNDING)),
    )


def _known_step(noise_multiplier: float, grid_step: float) -> PrivacyLossDistribution:
    """The loss if the step that the example joins were known; an upper bound."""
    return pld.from_gaussian_mechanism(noise_multiplier, value_discretization_interval=grid_step)


def _log_binomial(total: int, chosen: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)


def _delta(loss: GridLoss, epsilons: np.ndarray, grid_step: float) -> np.ndarray:
    """The privacy profile of a loss on the grid, at each epsilon."""
    losses = grid_step * (loss.lowest + np.arange(len(loss.probabilities)))
    above = np.append(np.cumsum(loss.probabilities[::-1])[::-1], 0.0)
    discounted = np.append(np.cumsum((loss.probabilities * np.exp(-losses))[::-1])[::-1], 0.0)
    following = np.searchsorted(losses, epsilons, side="right")
    return (
        np.maximum(above[following] - np.exp(epsilons) * discounted[following], 0.0) + loss.infinite
    )


def _symmetric_envelope(positions: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The largest profile below the points that is convex, also across epsilon zero.

    Let f be a symmetric profile, as a function of x = exp(epsilon). Below 1 it follows from
    f(1 / x) = 1 - 1 / x + f(x) / x. A chord from (1 / x, f(1 / x)) to (x, f(x)) then passes through
    (-1, 1), whatever x is. So this point joins the ones that a convex function must be below.
    """
    positions, heights = np.append(-1.0, positions), np.append(1.0, heights)
    hull: list[int] = []
    for index in range(len(positions)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            slope = (heights[index] - heights[a]) / (positions[index] - positions[a])
            if heights[b] < heights[a] + slope * (positions[b] - positions[a]):
                break
            hull.pop()
        hull.append(index)
    corners = np.array(hull)
    following = np.clip(np.searchsorted(corners, np.arange(len(positions))), 1, None)
    left, right = corners[following - 1], corners[following]
    # Weights of both ends, because differences of the heights would lose the smaller one.
    width = positions[right] - positions[left]
    found = (positions[right] - positions) / width * heights[left]
    found += (positions - positions[left]) / width * heights[right]
    # Rounding up, where neighbours differ by less than a rounding error.
    return np.asarray(np.maximum.accumulate(found[:0:-1])[::-1])
