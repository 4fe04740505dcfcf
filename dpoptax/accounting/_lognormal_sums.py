"""Sums of independent lognormals: upper bounds in the convex order, on a grid.

The convex order has two properties. A random variable grows if each of its values is split into two
neighbours with the same mean. And sums of independent variables grow with their terms. So we keep
distributions on a finite grid, and split whatever falls between two grid points. Splitting keeps
the mean, so the errors are of second order in the spacing, and about twenty sums of two variables
give the sum of hundreds. All numbers are positive, so rounding errors are relative.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import scipy.special

from dpoptax.accounting._subsampled_gaussian import TAIL, standard_deviations

# The spacing of the grid around the mean, in standard deviations. Splitting adds a sixth of its
# square to the variance of each sum of two, so about 0.4 % for hundreds of terms.
SPACING = 1 / 25
# How the spacing grows with the distance from the mean, and its largest ratio to a value; both are
# multiplied by the spacing above.
GROWTH = 0.3
LARGEST_RATIO = 0.6
# How far grids of sums reach beyond the mean, in standard deviations.
DEVIATIONS = 12
# So many rows of sums are split at once, which fit into the processor's cache.
ROWS = 16
# Sums with up to so many terms of half the noise share the sum of all other terms.
MAX_FULL = 4


class Ratio(NamedTuple):
    """An upper bound, in the convex order, of a sum of lognormals.

    Attributes:
        values: ascending, the first is zero.
        probs: of the values.
        cut: the mean of what exceeds the last value.
    """

    values: np.ndarray
    probs: np.ndarray
    cut: float


@functools.lru_cache(maxsize=64)
def sum_of(num_terms: int, noise_multiplier: float, spacing: float) -> Ratio:
    """Returns an upper bound of X_1 + ... + X_n, each exp(z s - s^2 / 2), s = 1 / noise."""
    if num_terms == 1:
        return _lognormal(noise_multiplier, spacing)
    half = sum_of(num_terms // 2, noise_multiplier, spacing)
    even = _add(half, half, spacing)
    if num_terms % 2 == 0:
        return even
    return _add(even, sum_of(1, noise_multiplier, spacing), spacing)


def sum_with_full(num_terms: int, noise_multiplier: float, spacing: float, num_full: int) -> Ratio:
    """Returns the same, where so many terms have half the noise."""
    if num_full == 0:
        return sum_of(num_terms, noise_multiplier, spacing)
    # The sum of most terms is shared by all cases.
    rest = min(MAX_FULL, num_terms)
    terms = [sum_of(1, noise_multiplier / 2, spacing)] * num_full
    terms += [sum_of(1, noise_multiplier, spacing)] * (rest - num_full)
    if rest < num_terms:
        terms.insert(0, sum_of(num_terms - rest, noise_multiplier, spacing))
    return functools.reduce(functools.partial(_add, spacing=spacing), terms)


def _lognormal(noise_multiplier: float, spacing: float) -> Ratio:
    """An upper bound of one X in the convex order; a mean of about TAIL is cut."""
    shift = 1 / noise_multiplier
    reach = standard_deviations(TAIL) * shift
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
    return Ratio(points, probs, max(float(means[-1] - points[-1] * masses[-1]), 0.0))


def _interval_probability(bounds: np.ndarray) -> np.ndarray:
    """The probability of a standard normal between neighbouring bounds, to full precision."""
    low, high = bounds[:-1], bounds[1:]
    # In the upper half by the complement, where the distribution function rounds to one.
    upper = low > 0
    below = scipy.special.ndtr(np.where(upper, -low, high))
    return below - scipy.special.ndtr(np.where(upper, -high, low))


def _add(first: Ratio, second: Ratio, spacing: float) -> Ratio:
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
        found, beyond = split(values.ravel(), weights.ravel(), points)
        probs += found
        cut += beyond
    return _without_rare(Ratio(points, probs, cut))


def split(values: np.ndarray, probs: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, float]:
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


def _without_rare(ratio: Ratio) -> Ratio:
    """Splits the smallest values between zero and the first value that is not rare."""
    first = max(int(np.searchsorted(np.cumsum(ratio.probs), TAIL)), 1)
    if first <= 1:
        return ratio
    points = np.concatenate([[0.0], ratio.values[first:]])
    found, _ = split(ratio.values[:first], ratio.probs[:first], points[:2])
    probs = np.concatenate([[0.0], ratio.probs[first:]])
    probs[:2] += found
    return Ratio(points, probs, ratio.cut)


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
