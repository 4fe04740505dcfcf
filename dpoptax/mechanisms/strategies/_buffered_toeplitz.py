"""Buffered linear Toeplitz strategy (BLT): long correlations from a few buffers."""

from typing import Any, NamedTuple

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.mechanisms.strategies import _optimize
from dpoptax.mechanisms.strategies._series import Series
from dpoptax.mechanisms.strategies._toeplitz import (
    ToeplitzStrategy,
    _scaled,
    horizon,
    numbers,
)


class Buffers(NamedTuple):
    """What the next noise needs.

    Attributes:
        sums: like the noise, with a leading axis of one number per buffer: past noises, each
            multiplied by the decay for every step since.
    """

    sums: PyTree[Float[Array, "..."]]


def _scales(values: Any) -> tuple[float, ...]:
    return numbers("scales", values)


def _decays(values: Any) -> tuple[float, ...]:
    return numbers("decays", values)


@attrs.frozen(slots=False)
class BufferedToeplitz(ToeplitzStrategy):
    """Buffered linear Toeplitz matrix (BLT): a sum of a few geometric series.

    Before scaling, `C[t, t]` is 1 and `C[t, t - j]` is the sum of `scales[i] * decays[i]**(j - 1)`.
    The state of a run has one copy of the gradient per buffer, however long the correlations are.

    `C` has as many bands as steps. Sampling therefore does not amplify privacy, and the sampler
    must keep the participations of an example apart.

    Attributes:
        scales: one per buffer.
        decays: one per buffer, from 0 to 1.
        num_steps: how many steps the strategy covers.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Example:
        >>> strategy = BufferedToeplitz(scales=(0.5,), decays=(0.5,), num_steps=3)
        >>> (strategy.column() / strategy.column()[0]).tolist()
        [1.0, 0.5, 0.25]

    Reference: Dvijotham et al. 2024, arXiv:2404.16706; McMahan, Xu and Zhang 2024,
    arXiv:2408.08868, for the recursion of the noise.
    """

    scales: tuple[float, ...] = attrs.field(converter=_scales)
    decays: tuple[float, ...] = attrs.field(converter=_decays)
    num_steps: int = attrs.field(converter=horizon)

    def __attrs_post_init__(self) -> None:
        if len(self.scales) != len(self.decays):
            raise ValueError(
                f"each buffer has one scale and one decay; got {len(self.scales)} scales and "
                f"{len(self.decays)} decays. Pass as many of each."
            )
        if min(self.decays) < 0 or max(self.decays) > 1:
            raise ValueError(
                f"decays must lie from 0 to 1; got {min(self.decays):g} to {max(self.decays):g}. "
                "A decay says how much of a buffer is left after a step."
            )

    @classmethod
    def optimal(
        cls,
        num_buffers: int,
        num_steps: int,
        *,
        separation: int | None = None,
        count: int | None = None,
        momentum: float = 0.0,
    ) -> "BufferedToeplitz":
        """Returns the scales and decays with the least mean squared error of the parameters.

        The arguments are those of `BandedInverse.optimal`.

        Args:
            num_buffers: how many buffers.
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
            >>> best = BufferedToeplitz.optimal(2, num_steps=100, separation=10)
            >>> len(best.decays)
            2
        """
        num_buffers, steps = _validate.count("num_buffers", num_buffers), horizon(num_steps)
        separation, count = _optimize.participations(steps, separation, count)
        scales, decays = _optimize.buffer_parameters(
            num_buffers, steps, separation, count, momentum
        )
        return cls(scales, decays, steps)

    def _unscaled(self) -> Series:
        column = np.ones(self.num_steps)
        powers = np.power.outer(np.asarray(self.decays), np.arange(self.num_steps - 1))
        column[1:] = np.asarray(self.scales) @ powers
        return column

    def init(self, like: PyTree[Float[Array, "..."]]) -> Buffers:
        """Returns the state before the first step; see `Strategy`."""
        size = len(self.scales)
        return Buffers(
            jax.tree.map(lambda leaf: jnp.zeros((size, *jnp.shape(leaf)), leaf.dtype), like)
        )

    def next(
        self, white: PyTree[Float[Array, "..."]], state: Any, step: Int[Array, ""]
    ) -> tuple[PyTree[Float[Array, "..."]], Buffers]:
        """Returns the noise of a step and the next state; see `Strategy`."""
        del step
        leading = float(_scaled(self)[0])

        def solve(leaf: Array, sums: Array) -> Array:
            scales = jnp.asarray(self.scales, leaf.dtype)
            earlier = jnp.tensordot(scales, sums, axes=1, precision=jax.lax.Precision.HIGHEST)
            return leaf / leading - earlier

        def advance(sums: Array, noise: Array) -> Array:
            decays = jnp.asarray(self.decays, noise.dtype)
            return sums * decays.reshape(-1, *[1] * noise.ndim) + noise

        noise = jax.tree.map(solve, white, state.sums)
        return noise, Buffers(jax.tree.map(advance, state.sums, noise))
