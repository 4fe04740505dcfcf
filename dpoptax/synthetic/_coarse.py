"""Coarse cells: neighbouring bins and rare categories are merged, by noisy counts alone.

A two-way table of fine cells has more noise than signal. The coarse cells follow from the noisy
one-way counts, so choosing them costs no privacy.
"""

import attrs
import numpy as np

from dpoptax.synthetic._columns import Column
from dpoptax.synthetic._draws import Draws

MOST_COARSE = 16
# A cell whose count is not clearly above its noise is merged.
LEAST_DEVIATIONS = 4.0


def shares(noisy: np.ndarray, total: float) -> np.ndarray:
    """Returns the probabilities that are closest to noisy counts, in L2 norm.

    Reference: Duchi et al. 2008, "Efficient projections onto the l1-ball", algorithm 1.
    """
    scaled = np.asarray(noisy, float) / total
    ordered = np.sort(scaled)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(ordered) + 1)
    last = np.nonzero(ordered > excess)[0][-1]
    return np.maximum(scaled - excess[last], 0)


@attrs.frozen(eq=False)
class Coarse:
    """Coarse cells of a column.

    Attributes:
        group: the coarse cell of each cell.
        size: how many coarse cells there are.
        within: the probability of each cell within its coarse cell.
    """

    group: np.ndarray
    size: int
    within: np.ndarray

    @classmethod
    def of(cls, column: Column, fine: np.ndarray, stddev: float, total: float) -> "Coarse":
        """Returns coarse cells for the noisy counts `fine`."""
        probability = shares(fine, total)
        least = LEAST_DEVIATIONS * stddev / total
        binned = probability[: column.num_bins]
        groups = _merged_bins(binned, max(least, binned.sum() / MOST_COARSE))
        used = int(groups.max()) + 1 if len(groups) else 0
        codes = probability[column.num_bins :]
        rare = codes < least
        if rare.sum() + (len(groups) == 0) <= 1:
            rare[:] = False
        rest = np.cumsum(~rare) - 1
        rest[rare] = (~rare).sum()
        group = np.concatenate([groups, used + rest]).astype(np.int64)
        size = int(group.max()) + 1
        return cls(group, size, within_groups(group, size, probability))

    def sums(self, fine: np.ndarray) -> np.ndarray:
        """Returns sums over the cells of each coarse cell."""
        return np.bincount(self.group, weights=fine, minlength=self.size)

    def refined(self, cells: np.ndarray, rng: Draws, *, independent: bool) -> np.ndarray:
        """Draws a cell within each coarse cell; see `Tables.draw`."""
        order = np.argsort(self.group, kind="stable")
        sizes = np.bincount(self.group, minlength=self.size)
        starts = np.cumsum(sizes) - sizes
        drawn = np.empty_like(cells)
        for coarse in range(self.size):
            rows = np.nonzero(cells == coarse)[0]
            members = order[starts[coarse] : starts[coarse] + sizes[coarse]]
            drawn[rows] = members[_choose(self.within[members], len(rows), rng, independent)]
        return drawn


def within_groups(group: np.ndarray, size: int, probability: np.ndarray) -> np.ndarray:
    """Returns the probability of each cell within its group; equal where the group has none."""
    mass = np.bincount(group, weights=probability, minlength=size)
    count = np.bincount(group, minlength=size)
    empty = mass[group] <= 0
    return np.where(empty, 1 / count[group], probability / np.where(empty, 1, mass[group]))


def _choose(probability: np.ndarray, rows: int, rng: Draws, independent: bool) -> np.ndarray:
    """Draws cells: independently, or each as often as expected, but for rounding."""
    even = None if independent else (rng.order(rows) + rng.uniform(1)) / max(rows, 1)
    points = rng.uniform(rows) if even is None else even
    ends = np.cumsum(probability)
    return np.searchsorted(ends[:-1] / ends[-1], points, side="right")


def _merged_bins(probability: np.ndarray, least: float) -> np.ndarray:
    groups = np.zeros(len(probability), np.int64)
    mass, current = 0.0, 0
    for index, share in enumerate(probability):
        # A heavy bin stands alone: what precedes it is closed.
        if mass > least / 2 and (mass >= least or share >= least):
            current, mass = current + 1, 0.0
        groups[index] = current
        mass += share
    if current and mass < least / 2:
        groups[groups == current] = current - 1
    return groups
