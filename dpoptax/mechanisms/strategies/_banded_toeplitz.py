"""Banded Toeplitz strategy: few bands, so that sampling still amplifies privacy."""

from typing import Any

import attrs
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.mechanisms.strategies import _optimize
from dpoptax.mechanisms.strategies._noise_ring import NoiseRing, empty_ring, next_noise
from dpoptax.mechanisms.strategies._series import Series, padded, square_root
from dpoptax.mechanisms.strategies._toeplitz import ToeplitzStrategy, horizon, leading_positive


def _coefficients(values: Any) -> tuple[float, ...]:
    return leading_positive("coefficients", values)


@attrs.frozen(slots=False)
class BandedToeplitz(ToeplitzStrategy):
    """A Toeplitz matrix with few bands: `C[t, t - j]` is `coefficients[j]`, scaled.

    It is the strategy for batches from `dpoptax.samplers.CyclicPoisson`: with at least as many
    groups as bands, every step is amplified by sampling. The state of a run has one copy of the
    gradient's noise for each band but the first.

    Attributes:
        coefficients: of the diagonals, the main one first; the main one must be positive. Their
            scale does not matter. All after `num_steps` are left out.
        num_steps: how many steps the strategy covers.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Example:
        >>> strategy = BandedToeplitz.optimal(num_bands=4, num_steps=100)
        >>> strategy.num_bands, strategy.matrix(num_steps=6).shape
        (4, (6, 6))

    Reference: Choquette-Choo et al. 2023, arXiv:2306.08153.
    """

    coefficients: tuple[float, ...] = attrs.field(converter=_coefficients)
    num_steps: int = attrs.field(converter=horizon)

    @classmethod
    def square_root(cls, num_bands: int, num_steps: int) -> "BandedToeplitz":
        """Returns the first bands of the square root of the matrix of prefix sums.

        Args:
            num_bands: how many.
            num_steps: how many steps the strategy covers.

        Returns:
            The strategy.

        Example:
            >>> BandedToeplitz.square_root(3, num_steps=10).coefficients
            (1.0, 0.5, 0.375)
        """
        num_bands = _validate.count("num_bands", num_bands)
        return cls(tuple(square_root(num_bands).tolist()), num_steps)

    @classmethod
    def optimal(cls, num_bands: int, num_steps: int, momentum: float = 0.0) -> "BandedToeplitz":
        """Returns the coefficients with the least mean squared error of the parameters.

        The error is that of all prefix sums of the noise, which is what SGD adds to the
        parameters, at the privacy of one participation.

        Args:
            num_bands: how many bands.
            num_steps: how many steps the strategy covers.
            momentum: of heavy-ball SGD, from 0 to below 1.

        Returns:
            The strategy.

        Raises:
            TypeError: a count is not whole, or `momentum` is not a number.
            ValueError: a number is out of range.

        Example:
            >>> found = BandedToeplitz.optimal(2, num_steps=1000)
            >>> round(found.coefficients[1], 2)
            0.88
        """
        num_bands = _validate.count("num_bands", num_bands)
        return cls(
            _optimize.banded_coefficients(num_bands, horizon(num_steps), momentum), num_steps
        )

    @property
    def taps(self) -> tuple[float, ...] | None:
        """See `Strategy`: one band needs no state."""
        return (1.0,) if self.num_bands == 1 else None

    def _unscaled(self) -> Series:
        return padded(self.coefficients, self.num_steps)

    def init(self, like: PyTree[Float[Array, "..."]]) -> NoiseRing:
        """Returns the state before the first step; see `Strategy`."""
        return empty_ring(like, self.num_bands - 1)

    def next(
        self, white: PyTree[Float[Array, "..."]], state: Any, step: Int[Array, ""]
    ) -> tuple[PyTree[Float[Array, "..."]], NoiseRing]:
        """Returns the noise of a step and the next state; see `Strategy`."""
        row = self.column(self.num_bands).astype("float32")
        return next_noise(white, state, step, jnp.asarray(row))
