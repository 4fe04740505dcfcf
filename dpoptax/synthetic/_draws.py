"""Random numbers for synthetic rows: NumPy arrays from a key, one stream for a whole run."""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray


class Draws:
    """A stream of random numbers. No guarantee rests on them: they only make synthetic rows."""

    def __init__(self, key: PRNGKeyArray) -> None:
        self._key = key
        self._drawn = 0

    def uniform(self, size: int) -> np.ndarray:
        """Returns numbers in [0, 1)."""
        return self._draw(jax.random.uniform, size)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns standard normal numbers."""
        return self._draw(jax.random.normal, math.prod(shape)).reshape(shape)

    def order(self, size: int) -> np.ndarray:
        """Returns a random order of `size` places."""
        return np.argsort(self.uniform(size), kind="stable")

    def _draw(self, distribution: Any, size: int) -> np.ndarray:
        self._drawn += 1
        key = jax.random.fold_in(self._key, self._drawn)
        # Few different shapes, because JAX compiles each of them.
        padded = 1 << max(size - 1, 0).bit_length()
        drawn = distribution(key, (padded,), np.float32)
        return np.asarray(drawn, np.float64)[:size]
