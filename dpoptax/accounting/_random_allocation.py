"""Random allocation: the privacy loss of one round in which an example joins one of t noisy sums.

Let one example move a sum by 1 / noise_multiplier, in units of the noise. With the example, the
outputs of a round have the distribution P = (1/t) sum_i N(e_i / noise_multiplier, I), and without
it Q = N(0, I). The ratio of the two densities is the mean of t independent lognormals,

    Y = (1/t) sum_i X_i,   X_i = exp(z_i / noise_multiplier - 1 / (2 noise_multiplier^2))

with standard normal z_i under Q (Chua et al. 2024, arXiv:2412.16802; Feldman and Shenfeld 2025,
arXiv:2502.08202). Both privacy profiles are expectations of convex functions of Y:

    removed:  delta(epsilon) = E_Q max(Y - exp(epsilon), 0)
    added:    delta(epsilon) = E_Q max(1 - exp(epsilon) Y, 0)

So a distribution that is larger in the convex order gives upper bounds of both. The convex order
has the two properties that we need: a random variable grows if each of its values is split into two
neighbours with the same mean, and sums of independent variables grow with their terms. So we keep
distributions on a finite grid, and split whatever falls between two grid points. Splitting keeps
the mean, so the errors are of second order in the spacing, and about twenty sums of two variables
give the sum of hundreds. All numbers are positive, so rounding errors are relative.

What exceeds the last grid point would be cut. By max(a + b, 0) <= max(a, 0) + max(b, 0), the cut
changes the profile by at most the mean of what is cut. This mean is the probability under P of a
privacy loss that counts as infinite.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import scipy.special
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from dpoptax._dp_events import TruncatedRandomAllocationDpEvent
from dpoptax.accounting._dp_accounting_compat import GridLoss, distribution, from_deltas

# The probability under P of losses beyond the grid, and under Q of values that are split to zero.
# A million rounds add less than 1e-15 to delta.
TAIL = 1e-22
# The spacing of the grid around the mean, in standard deviations. Splitting adds a sixth of its
# square to the variance of each sum of two, so about 0.4 % for hundreds of steps, and half of that
# to epsilon.
SPACING = 1 / 25
# How the spacing grows with the distance from the mean, and its largest ratio to a value; both are
# multiplied by the spacing above.
GROWTH = 0.3
LARGEST_RATIO = 0.6
# A bound on the relative rounding error of the probabilities: sums of up to 1e7 positive terms.
ROUNDING = 1e-8
# How far grids of sums reach beyond the mean, in standard deviations.
DEVIATIONS = 12
# So many rows of sums are split at once, which fit into the processor's cache.
ROWS = 16
# So many full batches of a round are told apart; if there are more, all count as full.
MAX_FULL = 4
# How a loss is shared between the two halves of a replacement, as fractions of epsilon.
SHARES = (0.4, 0.45, 0.5, 0.55, 0.6)


class _Ratio(NamedTuple):
    """An upper bound, in the convex order, of a sum of X_i under Q.

    Attributes:
        values: ascending, the first is zero.
        probs: of the values.
        cut: the mean of what exceeds the last value.
    """

    values: np.ndarray
    probs: np.ndarray
    cut: float


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
    while at_least[-1] > TAIL and len(at_least) <= min(MAX_FULL, steps):
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
    removed, added = _losses(num_steps, noise_multiplier, grid_step, 0)
    last = max(removed.lowest + len(removed.probabilities), added.lowest + len(added.probabilities))
    epsilons = grid_step * np.arange(2 * last + 1)
    bounds = [
        _delta(removed, share * epsilons, grid_step)
        + np.exp(share * epsilons) * _delta(added, (1 - share) * epsilons, grid_step)
        for share in SHARES
    ]
    # Nor does it cost more than if the step were known.
    shift = 2 / noise_multiplier
    bounds.append(
        scipy.special.ndtr(shift / 2 - epsilons / shift)
        - np.exp(epsilons + scipy.special.log_ndtr(-shift / 2 - epsilons / shift))
    )
    above = _convex_envelope(np.exp(epsilons), np.minimum(np.min(bounds, axis=0), 1.0))
    below = -np.expm1(-epsilons) + np.exp(-epsilons) * above
    deltas = np.concatenate([below[:0:-1], above])
    return distribution(grid_step, from_deltas(grid_step, -2 * last, 2 * last, deltas))


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
    # A search on a coarse grid of losses does not need a fine grid here either.
    coarse = grid_step > 2 * usual_grid_step(num_steps, noise_multiplier)
    spacing = 2 * SPACING if coarse else SPACING
    values, probs, cut = _sum_with_full(num_steps, noise_multiplier, spacing, num_full)
    values, cut = values / num_steps, cut / num_steps
    first, last = values[1], values[-1]
    lowest = math.floor(math.log(first) / grid_step)
    highest = math.ceil(math.log(last) / grid_step)
    losses = grid_step * np.arange(lowest, highest + 1)
    at_zero, *on_grid = _split(values, probs, np.concatenate([[0.0], np.exp(losses)]))[0]
    added = np.array(on_grid) * (1 + ROUNDING)
    # Under P a value y of Y is y times as likely, and its loss is log(y).
    removed = added * np.exp(losses)
    return (
        GridLoss(removed, lowest, cut * (1 + ROUNDING)),
        GridLoss(added[::-1], -highest, at_zero * (1 + ROUNDING)),
    )


@functools.lru_cache(maxsize=64)
def _sum_of(num_terms: int, noise_multiplier: float, spacing: float) -> _Ratio:
    """An upper bound of X_1 + ... + X_n in the convex order."""
    if num_terms == 1:
        return _lognormal(noise_multiplier, spacing)
    half = _sum_of(num_terms // 2, noise_multiplier, spacing)
    even = _add(half, half, spacing)
    if num_terms % 2 == 0:
        return even
    return _add(even, _sum_of(1, noise_multiplier, spacing), spacing)


def _sum_with_full(
    num_terms: int, noise_multiplier: float, spacing: float, num_full: int
) -> _Ratio:
    """The same, where so many terms have half the noise."""
    if num_full == 0:
        return _sum_of(num_terms, noise_multiplier, spacing)
    # The sum of most terms is shared by all cases.
    rest = min(MAX_FULL, num_terms)
    terms = [_sum_of(1, noise_multiplier / 2, spacing)] * num_full
    terms += [_sum_of(1, noise_multiplier, spacing)] * (rest - num_full)
    if rest < num_terms:
        terms.insert(0, _sum_of(num_terms - rest, noise_multiplier, spacing))
    return functools.reduce(functools.partial(_add, spacing=spacing), terms)


def _lognormal(noise_multiplier: float, spacing: float) -> _Ratio:
    """An upper bound of one X in the convex order."""
    shift = 1 / noise_multiplier
    reach = _deviations(TAIL) * shift
    deviation = math.sqrt(math.expm1(min(shift**2, 600.0)))
    smallest, largest = math.exp(-reach - shift**2 / 2), math.exp(min(reach + shift**2 / 2, 600.0))
    points = _grid(1.0, deviation, smallest, largest, spacing)
    bounds = np.concatenate([[-math.inf], np.log(points[1:]), [math.inf]]) * noise_multiplier
    # Between two points lie the probability of X under Q, and its mean there, which is a
    # probability under P.
    masses = _interval_probability(bounds + shift / 2)
    means = _interval_probability(bounds - shift / 2)
    uppers = np.clip((means - points * masses)[:-1] / np.diff(points), 0.0, masses[:-1])
    probs = np.append(masses[:-1] - uppers, masses[-1])
    probs[1:] += uppers
    # The last interval is cut to its lower end.
    return _Ratio(points, probs, max(float(means[-1] - points[-1] * masses[-1]), 0.0))


def _interval_probability(bounds: np.ndarray) -> np.ndarray:
    """The probability of a standard normal between neighbouring bounds, to full precision."""
    low, high = bounds[:-1], bounds[1:]
    # In the upper half by the complement, where the distribution function rounds to one.
    upper = low > 0
    below = scipy.special.ndtr(np.where(upper, -low, high))
    return below - scipy.special.ndtr(np.where(upper, -high, low))


def _add(first: _Ratio, second: _Ratio, spacing: float) -> _Ratio:
    """An upper bound of the sum of two independent variables."""
    means = [float(one.probs @ one.values) for one in (first, second)]
    squares = [float(one.probs @ np.square(one.values)) for one in (first, second)]
    variance = sum(square - mean**2 for square, mean in zip(squares, means, strict=True))
    smallest = first.values[1] + second.values[1]
    mean, deviation = sum(means), math.sqrt(max(variance, 0.0))
    # A large sum has one large term, or many that are a little larger than usual.
    largest = max(first.values[-1] + means[1], second.values[-1] + means[0])
    largest = max(largest, mean + DEVIATIONS * deviation)
    points = _grid(mean, deviation, smallest, largest, spacing)
    probs = np.zeros(len(points))
    cut = first.cut + second.cut
    for start in range(0, len(first.values), ROWS):
        rows = slice(start, start + ROWS)
        # The sums of two different values of one variable occur twice.
        columns = slice(start, None) if first is second else slice(None)
        weights = np.multiply.outer(first.probs[rows], second.probs[columns])
        if first is second:
            size = len(weights)
            weights[:, :size] *= np.triu(np.full((size, size), 2.0)) - np.eye(size)
            weights[:, size:] *= 2
        values = np.add.outer(first.values[rows], second.values[columns])
        found, beyond = _split(values.ravel(), weights.ravel(), points)
        probs += found
        cut += beyond
    return _without_rare(_Ratio(points, probs, cut))


def _split(values: np.ndarray, probs: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, float]:
    """Splits values between the neighbouring points, and keeps the mean; also returns what is cut.

    The first point is zero.
    """
    inside = np.minimum(values, points[-1])
    lower = np.maximum(points.searchsorted(inside) - 1, 0)
    to_upper = probs * ((inside - points[lower]) / np.diff(points)[lower])
    found = np.zeros(len(points))
    found[1:] += np.bincount(lower, to_upper, len(points) - 1)
    found[:-1] += np.bincount(lower, probs - to_upper, len(points) - 1)
    return found, float((probs * (values - inside)).sum())


def _without_rare(ratio: _Ratio) -> _Ratio:
    """Splits the smallest values between zero and the first value that is not rare."""
    first = max(int(np.searchsorted(np.cumsum(ratio.probs), TAIL)), 1)
    if first <= 1:
        return ratio
    points = np.concatenate([[0.0], ratio.values[first:]])
    found, _ = _split(ratio.values[:first], ratio.probs[:first], points[:2])
    probs = np.concatenate([[0.0], ratio.probs[first:]])
    probs[:2] += found
    return _Ratio(points, probs, ratio.cut)


def _grid(
    mean: float, deviation: float, smallest: float, largest: float, spacing: float
) -> np.ndarray:
    """Returns zero, and points that are denser around the mean."""
    # Where one large term dominates, the standard deviation says little about the bulk.
    deviation = min(deviation, mean)
    points, point = [0.0], smallest
    while point < largest:
        points.append(point)
        step = spacing * math.hypot(deviation, GROWTH * (point - mean))
        point += min(step, spacing * LARGEST_RATIO * point)
    return np.array([*points, largest])


def _log_binomial(total: int, chosen: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)


def _deviations(tail: float) -> float:
    return float(-scipy.special.ndtri(tail))


def _delta(loss: GridLoss, epsilons: np.ndarray, grid_step: float) -> np.ndarray:
    """The privacy profile of a loss on the grid, at each epsilon."""
    losses = grid_step * (loss.lowest + np.arange(len(loss.probabilities)))
    above = np.append(np.cumsum(loss.probabilities[::-1])[::-1], 0.0)
    discounted = np.append(np.cumsum((loss.probabilities * np.exp(-losses))[::-1])[::-1], 0.0)
    following = np.searchsorted(losses, epsilons, side="right")
    return (
        np.maximum(above[following] - np.exp(epsilons) * discounted[following], 0.0) + loss.infinite
    )


def _convex_envelope(positions: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The largest convex function below the points. A convex function below them is below it."""
    hull: list[int] = []
    for index in range(len(positions)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            slope = (heights[index] - heights[a]) / (positions[index] - positions[a])
            if heights[b] < heights[a] + slope * (positions[b] - positions[a]):
                break
            hull.pop()
        hull.append(index)
    return np.interp(positions, positions[hull], heights[hull])
