"""Lower bounds of epsilon for random allocation, by the code of the upper bounds rounded down.

The mean of a part of a distribution stands for that part. This makes it smaller in the convex
order, in which the privacy profiles grow; see `dpoptax/accounting/_random_allocation.py`. Losses
are then rounded down to the grid.
"""

import functools
import math

import numpy as np

from dpoptax.accounting import _lognormal_sums as sums
from dpoptax.accounting._compose import MAX_POINTS, Composition, StepLoss


@functools.lru_cache(maxsize=64)
def sum_of(num_terms, noise, spacing=sums.SPACING):
    """Values and probabilities of a lower bound of a sum of lognormals, all of mean one."""
    if num_terms == 1:
        shift = 1 / noise
        deviation = math.sqrt(math.expm1(min(shift**2, 600.0)))
        reach = 12 * shift
        smallest, largest = math.exp(-reach - shift**2 / 2), math.exp(reach + shift**2 / 2)
        points = sums._grid(1.0, deviation, smallest, largest, spacing)[1:]
        bounds = np.concatenate([[-math.inf], np.log(points), [math.inf]]) * noise
        masses = sums._interval_probability(bounds + shift / 2)
        return cells(masses, sums._interval_probability(bounds - shift / 2))
    half = sum_of(num_terms // 2, noise, spacing)
    even = add(half, half, spacing)
    return even if num_terms % 2 == 0 else add(even, sum_of(1, noise, spacing), spacing)


def add(first, second, spacing):
    (values, probs), (others, weights) = first, second
    means = [float(p @ v) for v, p in (first, second)]
    variance = sum(
        float(p @ (v - m) ** 2) for (v, p), m in zip((first, second), means, strict=True)
    )
    largest = max(values[-1] + means[1], others[-1] + means[0])
    points = sums._grid(sum(means), math.sqrt(variance), values[0] + others[0], largest, spacing)[
        1:
    ]
    masses, totals = np.zeros(len(points) + 1), np.zeros(len(points) + 1)
    for start in range(0, len(values), sums.ROWS):
        rows = slice(start, start + sums.ROWS)
        sum_values = np.add.outer(values[rows], others).ravel()
        both = np.multiply.outer(probs[rows], weights).ravel()
        places = points.searchsorted(sum_values)
        masses += np.bincount(places, both, len(masses))
        totals += np.bincount(places, both * sum_values, len(masses))
    return cells(masses, totals)


def cells(masses, means):
    """The mean of each part, and its probability."""
    some = masses > 1e-300
    return means[some] / masses[some], masses[some]


def losses(num_steps, noise, grid_step):
    """One round: values, their probabilities under Q, and the losses rounded down."""
    values, probs = sum_of(num_steps, noise)
    values = values / num_steps
    removed = np.floor(np.log(values) / grid_step).astype(int)
    added = np.floor(-np.log(values) / grid_step).astype(int)
    return (removed, probs * values), (added, probs)


def epsilon(num_steps, noise, rounds, delta, grid_step=1e-4):
    """A lower bound of epsilon, removed and added."""
    found = []
    for places, probs in losses(num_steps, noise, grid_step):
        on_grid = np.bincount(places - places.min(), probs)
        with np.errstate(divide="ignore"):
            step = StepLoss(np.log(on_grid), int(places.min()), 0.0, rounds)
        composition = Composition([step], grid_step)
        # Longer windows are not computed, but bounded from above.
        assert composition._size(0.0) <= MAX_POINTS
        found.append(composition.epsilon(delta))
    return found


def deltas(num_steps, noise, epsilons):
    """Lower bounds of the profile of one round, removed and added; exact for the values."""
    values, probs = sum_of(num_steps, noise)
    ratio = np.multiply.outer(np.exp(-np.asarray(epsilons)), values / num_steps)
    removed = np.maximum(ratio - 1, 0) @ probs * np.exp(epsilons)
    ratio = np.multiply.outer(np.exp(np.asarray(epsilons)), values / num_steps)
    return removed, np.maximum(1 - ratio, 0) @ probs
