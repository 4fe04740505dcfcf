"""Banded inverse strategy: the noise of a step is a sum of the last few independent draws."""

from typing import Any

import attrs

from dpoptax import _validate
from dpoptax.mechanisms.strategies import _optimize
from dpoptax.mechanisms.strategies._series import (
    Series,
    divide,
    inverse_square_root,
    padded,
    unit,
)
from dpoptax.mechanisms.strategies._toeplitz import (
    ToeplitzStrategy,
    _scaled,
    horizon,
    leading_positive,
)


def _inverse(values: Any) -> tuple[float, ...]:
    return leading_positive("inverse", values)


@attrs.frozen(slots=False)
class BandedInverse(ToeplitzStrategy):
    """A Toeplitz matrix whose inverse has few bands: `inverse[j]` for `C^-1[t, t - j]`, scaled.

    The noise of step t is `inverse[0] z_t + inverse[1] z_{t-1} + ...`, a sum of the last draws.
    Past draws are made again from their keys. So a run keeps no copy of the gradient.

    `C` itself has as many bands as steps. Sampling therefore does not amplify privacy, and the
    sampler must keep the participations of an example apart.

    Attributes:
        inverse: of the diagonals, the main one first; the main one must be positive. Their scale
            does not matter. All after `num_steps` are left out.
        num_steps: how many steps the strategy covers.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or `C` grows beyond all numbers.

    Example:
        >>> strategy = BandedInverse((1.0, -0.5), num_steps=3)
        >>> (strategy.matrix() / strategy.matrix()[0, 0])[:, 0].tolist()
        [1.0, 0.5, 0.25]

    Reference: Kalinin, McKenna, Upadhyay and Lampert 2025, arXiv:2505.12128.
    """

    inverse: tuple[float, ...] = attrs.field(converter=_inverse)
    num_steps: int = attrs.field(converter=horizon)

    @classmethod
    def square_root(cls, num_taps: int, num_steps: int) -> "BandedInverse":
        """Returns the first bands of the inverse square root of prefix sums: BISR.

        Args:
            num_taps: how many.
            num_steps: how many steps the strategy covers.

        Returns:
            The strategy.

        Example:
            >>> BandedInverse.square_root(3, num_steps=10).inverse
            (1.0, -0.5, -0.125)
        """
        num_taps = _validate.count("num_taps", num_taps)
        return cls(tuple(inverse_square_root(num_taps).tolist()), num_steps)

    @classmethod
    def optimal(
        cls,
        num_taps: int,
        num_steps: int,
        *,
        separation: int | None = None,
        count: int | None = None,
        momentum: float = 0.0,
    ) -> "BandedInverse":
        """Returns the inverse with the least mean squared error of the parameters.

        The error is that of all prefix sums of the noise, which is what SGD adds to the
        parameters, at the privacy of `count` participations that are `separation` steps apart.

        Args:
            num_taps: how many bands the inverse has.
            num_steps: how many steps the strategy covers.
            separation: of the participations of an example, in steps; None for one participation.
            count: how many there are at most; None for as many as fit.
            momentum: of heavy-ball SGD, from 0 to below 1.

        Returns:
            The strategy.

        Raises:
            TypeError: a count is not whole, or `momentum` is not a number.
            ValueError: a number is out of range.

        Example:
            >>> best = BandedInverse.optimal(4, num_steps=200, separation=20)
            >>> len(best.inverse)
            4
        """
        num_taps, steps = _validate.count("num_taps", num_taps), horizon(num_steps)
        separation, count = _optimize.participations(steps, separation, count)
        return cls(
            _optimize.inverse_coefficients(num_taps, steps, separation, count, momentum), steps
        )

    @property
    def taps(self) -> tuple[float, ...] | None:
        """See `Strategy`."""
        scale = _scaled(self)[0] * self.inverse[0]
        return tuple(tap / scale for tap in self.inverse[: self.num_steps])

    def _unscaled(self) -> Series:
        return divide(unit(self.num_steps), padded(self.inverse, len(self.inverse)))
