"""Base class of strategies that are Toeplitz matrices: each column is the first one, moved down."""

import abc
import functools
from typing import Any

import numpy as np
from jaxtyping import Float64

from dpoptax import _validate
from dpoptax.mechanisms._strategy import Strategy
from dpoptax.mechanisms.strategies._series import Series, divide, unit

# Squares of smaller numbers underflow.
SMALLEST_NORM = 1e-100


class ToeplitzStrategy(Strategy):
    """Base class of strategies that are Toeplitz matrices."""

    @abc.abstractmethod
    def _unscaled(self) -> Series:
        """The first column of the matrix before it is scaled, `num_steps` numbers."""

    @property
    def num_bands(self) -> int:
        """See `Strategy`."""
        return int(np.flatnonzero(_scaled(self))[-1]) + 1

    def column(self, num_steps: int | None = None) -> Series:
        """Returns the first column of `C`, scaled to norm one; its first numbers if asked for."""
        return _scaled(self)[: self._checked(num_steps)].copy()

    def matrix(self, num_steps: int | None = None) -> Float64[np.ndarray, "steps steps"]:
        """See `Strategy`."""
        import scipy.linalg  # slow to import

        column = self.column(num_steps)
        return np.asarray(scipy.linalg.toeplitz(column, np.zeros(len(column))))

    def noise_norms(self) -> Float64[np.ndarray, " steps"]:
        """See `Strategy`."""
        return np.sqrt(np.cumsum(divide(unit(self.num_steps), _scaled(self)) ** 2))

    def _checked(self, num_steps: int | None) -> int:
        if num_steps is None:
            return self.num_steps
        return _validate.count("num_steps", num_steps)


@functools.lru_cache(maxsize=64)
def _scaled(strategy: ToeplitzStrategy) -> Series:
    with np.errstate(over="ignore", invalid="ignore"):
        column = strategy._unscaled()
        norm = float(np.linalg.norm(column))
    if not np.isfinite(norm):
        raise ValueError(
            f"the matrix of this {type(strategy).__name__} grows beyond all numbers within "
            f"{strategy.num_steps} steps. Take numbers whose sum is smaller, such as those of "
            "BandedInverse.square_root."
        )
    if norm < SMALLEST_NORM:
        raise ValueError(
            f"the numbers of this {type(strategy).__name__} are too small to compute with; got a "
            f"column of norm {norm:.3g}. Divide them by the first one: their scale does not matter."
        )
    return column / norm


def numbers(name: str, values: Any) -> tuple[float, ...]:
    """Returns finite numbers as a tuple of floats."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, tuple | list) or not values:
        raise TypeError(
            f"{name} must be a tuple of numbers; got {_validate.described(values)}. Pass at least "
            "one number."
        )
    found = tuple(_validate.real(name, value) for value in values)
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite; got infinity. Check how they were computed.")
    return found


def leading_positive(name: str, values: Any) -> tuple[float, ...]:
    """Returns finite numbers, of which the first is positive."""
    found = numbers(name, values)
    if found[0] <= 0:
        raise ValueError(
            f"the first of {name} must be positive, so that the matrix has an inverse; got "
            f"{found[0]}. Divide all of them by it, or change their signs."
        )
    return found


def horizon(value: Any) -> int:
    """Returns the number of steps of a strategy."""
    return _validate.count("num_steps", value)
