"""Counts of a table with exact discrete Gaussian noise, charged before the noise is drawn.

A row is in one cell of each table that is counted, so it moves a table of counts by at most one in
L2 norm, and a score that is a sum of absolute differences of counts by at most one. With weights w,
a row moves all tables of one release by at most ||w||.

The counts are whole numbers, scaled by whole numbers of grid steps. The noise is a discrete
Gaussian on the same grid, so floating-point numbers take no part in it. `DiscreteGaussian` has the
proof that it costs what Gaussian noise costs.
"""

import fractions
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax.accounting import Ledger
from dpoptax.mechanisms._discrete_gaussian import SMOOTHING
from dpoptax.random._derive import derive_key
from dpoptax.random._discrete_gaussian import discrete_gaussian
from dpoptax.samplers import Poisson

BITS = 20
# Below this, int64 holds a count of grid steps and its noise.
MOST_ROWS = 2**36


def grid_steps(weights: Sequence[float], noise_multiplier: float) -> list[int]:
    """Returns the whole number of grid steps of each weight, such that a row keeps the bound."""
    squared = (4**BITS - SMOOTHING) / fractions.Fraction(noise_multiplier) ** 2
    norm = math.sqrt(sum(weight**2 for weight in weights))
    scale = math.sqrt(squared) / norm
    # Rounded down, so the exact comparison fails only where floating point rounded up.
    steps = [math.floor(scale * weight) for weight in weights]
    while sum(step**2 for step in steps) > squared:
        steps = [step - 1 for step in steps]
    if min(steps) < 1:
        raise ValueError(
            "epsilon is too small for so many columns: the noise does not fit on the grid. Take "
            "fewer columns, or a larger epsilon."
        )
    return steps


class Releases:
    """Releases of counts of one table, with their ledger.

    Attributes:
        ledger: what was charged. A release is a step in which every row takes part.
    """

    def __init__(self, key: PRNGKeyArray, delta: float) -> None:
        self._key = key
        self.ledger = Ledger(Poisson(1, 1), clip=1.0, delta=delta)

    def release(
        self,
        counts: Sequence[np.ndarray],
        noise_multiplier: float,
        weights: Sequence[float] | None = None,
    ) -> tuple[list[np.ndarray], list[float]]:
        """Charges and returns noisy counts, and the standard deviation of the noise of each table.

        Args:
            counts: int64 tables. A row moves each by at most one in L2 norm.
            noise_multiplier: of the whole release.
            weights: how exact each table is relative to the others; equal by default.

        Returns:
            The noisy tables, and the standard deviation of the noise of a count in each.
        """
        if any(table.dtype != np.int64 for table in counts):
            raise TypeError("counts must be int64.")
        if any(table.size and int(np.abs(table).max()) >= MOST_ROWS for table in counts):
            raise ValueError(f"the table must have fewer than {MOST_ROWS:,} rows.")
        steps = grid_steps([1.0] * len(counts) if weights is None else weights, noise_multiplier)
        key = derive_key(self._key, f"release {self.ledger.num_steps} {_digest(counts, steps)}")
        self.ledger.charge(noise_multiplier)
        size = sum(table.size for table in counts)
        noise = np.asarray(discrete_gaussian(key, (size,), bits=BITS)).astype(np.int64)
        ends = np.cumsum([table.size for table in counts])[:-1]
        noisy = [
            (table * step + part.reshape(table.shape)) / step
            for table, part, step in zip(counts, np.split(noise, ends), steps, strict=True)
        ]
        return noisy, [2**BITS / step for step in steps]


def _digest(counts: Sequence[np.ndarray], steps: Sequence[int]) -> str:
    """Returns a text that differs for other counts: under one key they must not share noise."""
    digest = hashlib.sha256(repr(steps).encode())
    for table in counts:
        digest.update(f"{table.shape}".encode() + table.tobytes())
    return digest.hexdigest()
