"""Discrete Gaussian mechanism: integer sums, and exact noise on a grid."""

import fractions
import math
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._precision import widen
from dpoptax._pytree import PyTree
from dpoptax.clipping import ClipRule
from dpoptax.mechanisms._base import noise_stddev
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._base import select
from dpoptax.per_example._leaf_weights import kept_by_leaf, weights_by_leaf
from dpoptax.random._discrete_gaussian import MAX_BITS, discrete_gaussian
from dpoptax.schedules import ScalarOrSchedule, Schedule, as_schedule

# A float32 sum of squares over a tree of L levels is too small by a factor of at most
# (L + 2) * 2**-24, and no model needs 120 levels.
SHORTFALL = fractions.Fraction(1, 2**17)
# The variance, in squared grid steps, that the proof in `DiscreteGaussian` uses up.
SMOOTHING = 9
# Of the 32 bits of a sum, the noise may need 16 standard deviations.
NOISE_ROOM = 16


def _bits(value: int) -> int:
    bits = _validate.count("bits", value, at_least=4)
    if bits > MAX_BITS:
        raise ValueError(f"bits must be at most {MAX_BITS}; got {bits}.")
    return bits


@attrs.frozen
class DiscreteGaussian:
    """Discrete Gaussian noise on a grid, and sums of integers: no rounding weakens the guarantee.

    The contribution of an example is clipped, scaled to the grid and rounded. Rounding adds at most
    sqrt(parameters) / 2 grid steps to its norm, so its bound is tightened by as much. A rounded
    contribution with a squared norm above the bound is dropped. Sums are integers, and the noise
    is a discrete Gaussian, drawn bit by bit.

    It is accounted as Gaussian noise of the same multiplier z, under every sampler and relation.
    The proof, with s = 2**bits and the bound B = sqrt(s**2 - 9) / z grid steps: add continuous
    noise N(0, s**2 - 9) to an integer sum. This is the Gaussian mechanism of multiplier z. Call the
    result x, and round it at random to an integer k with probability proportional to
    exp(-(k - x)**2 / 18). This is post-processing. By Poisson summation the constant of
    proportionality is the same for all x, up to a relative 4 exp(-18 pi**2) < 1e-76. So k has the
    discrete Gaussian distribution of variance s**2 up to the same factor. A run of 1e6 steps on
    1e12 parameters costs 1e-57 of epsilon more.

    It needs the gradients in stacked form, `(batch, parameters)` numbers. For large models, pass
    `microbatch_size` to `per_example_grads`. Each number of noise takes about forty random words.

    Attributes:
        bits: the standard deviation of the noise is 2**bits grid steps; from 4 to 24. More bits
            lose less to rounding. Fewer bits leave more room in the 32 bits of a sum.

    Raises:
        TypeError: `bits` is not a whole number.
        ValueError: `bits` is out of range. When used: there is no noise, or the grid is too coarse
            or too fine for the model.

    Example:
        >>> import dpoptax, jax
        >>> tx = dpoptax.privatize(
        ...     1.0,
        ...     1.1,
        ...     expected_batch_size=32,
        ...     key=jax.random.key(0),
        ...     mechanism=dpoptax.mechanisms.DiscreteGaussian(),
        ... )

    Reference: Canonne, Kamath and Steinke 2020, arXiv:2004.00010; Kairouz, Liu and Steinke 2021,
    arXiv:2102.06387, for rounding; Micciancio and Regev 2007 for the sum of the two distributions.
    """

    bits: int = attrs.field(default=16, converter=_bits)

    @property
    def caveat(self) -> str:
        """See `Mechanism.caveat`."""
        return (
            f"noise is a discrete Gaussian of 2**{self.bits} grid steps on integer sums, exact if "
            "the random bits are uniform"
        )

    def release(
        self,
        key: PRNGKeyArray,
        grads: PerExampleGrads,
        clip: ClipRule,
        noise_multiplier: ScalarOrSchedule,
        step: Int[Array, ""] | int,
    ) -> PyTree[Float[Array, "..."]]:
        """See `Mechanism.release`."""
        specs = jax.tree.leaves(grads.parameter_specs())
        dimension = sum(math.prod(spec.shape) for spec in specs)
        bounds = self._squared_bounds(noise_multiplier)
        self._check_room(len(grads.mask), dimension, bounds)
        # The squared bound rounds down to float32, so that the comparison below is on the safe
        # side. The other numbers only choose the grid, and need not be exact.
        squared_bound = jnp.asarray(bounds.at(step), jnp.float32)
        bound = jnp.sqrt(squared_bound)
        l2_clip = jnp.asarray(as_schedule(clip.l2_clip).at(step), jnp.float32)
        steps_per_unit = bound / l2_clip

        def integer_sum(part: PerExampleGrads) -> PyTree[Array]:
            squared_norms = part.squared_norms()
            structure = jax.tree.structure(squared_norms)
            by_leaf = weights_by_leaf(clip.weights(squared_norms, step), structure, part.mask)
            weights = [leaf.astype(jnp.float32) for leaf in by_leaf]
            kept = kept_by_leaf(weights, part.mask)
            norms = bound * _relative_norms(weights, jax.tree.leaves(squared_norms), l2_clip)
            # Leave room for rounding, which adds at most sqrt(dimension) / 2 to a norm.
            room = bound - math.sqrt(dimension) / 2
            scale = steps_per_unit * jnp.minimum(1, room / norms)

            def rounded(leaf: Array, weights: Array, kept: Array) -> Array:
                rows = (weights * scale).reshape(-1, *[1] * (leaf.ndim - 1))
                return jnp.rint(select(kept, widen(leaf).astype(jnp.float32) * rows))

            leaves = jax.tree.leaves(part.stacked())
            integers = list(map(rounded, leaves, weights, kept))
            # The guarantee rests on this comparison alone. Whatever floating point did above, a
            # contribution beyond the bound is dropped.
            within = _sums_of_squares(integers) <= squared_bound
            return jax.tree.unflatten(
                structure,
                [
                    select(within, leaf).astype(jnp.int32).sum(axis=0, dtype=jnp.int32)
                    for leaf in integers
                ],
            )

        leaves, treedef = jax.tree.flatten(grads.sum_by_parts(integer_sum))
        keys = jax.random.split(key, len(leaves))
        noisy = []
        for leaf_key, leaf, spec in zip(keys, leaves, specs, strict=True):
            # Beyond 32 bits the integers wrap around. This is a function of the exact release, so
            # it costs accuracy and no privacy; so does the division afterwards.
            released = leaf + discrete_gaussian(leaf_key, leaf.shape, bits=self.bits)
            dtype = widen(jnp.zeros((), spec.dtype)).dtype
            noisy.append(released.astype(dtype) / steps_per_unit.astype(dtype))
        return jax.tree.unflatten(treedef, noisy)

    def release_votes(
        self,
        key: PRNGKeyArray,
        votes: Int[Array, ""],
        noise_multiplier: ScalarOrSchedule,
        step: Int[Array, ""] | int,
        batch: int,
    ) -> Float[Array, ""]:
        """Returns the votes with exact noise on the grid of the gradients; see `Mechanism`.

        A vote is a whole number of grid steps, rounded down. So the gradient of an example and its
        vote have a joint squared norm of at most (4**bits - 9) / z**2 grid steps, with the noise
        multiplier z of the whole step, and the proof of the class holds for both together.
        """
        noise = as_schedule(noise_multiplier)
        steps = tuple(self._steps_per_vote(value, batch) for value in noise.values)
        # Below 2**24, so float32 holds it exactly.
        per_vote = jnp.asarray(Schedule(steps, noise.lengths).at(step), jnp.float32)
        released = votes * per_vote.astype(jnp.int32)
        released = released + discrete_gaussian(key, (), bits=self.bits)
        return released.astype(jnp.float32) / per_vote

    def check(self, clip: ClipRule, noise_multiplier: ScalarOrSchedule) -> None:
        """See `Mechanism.check`."""
        noise_stddev(clip, noise_multiplier)
        if as_schedule(noise_multiplier).min == 0:
            raise ValueError(
                "exact noise needs a positive noise_multiplier, which sets the grid; got 0. "
                "Without noise, leave the mechanism out."
            )

    def _squared_bounds(self, noise_multiplier: ScalarOrSchedule) -> Schedule:
        """Returns the largest squared norm of a contribution, in squared grid steps, by step."""
        noise = as_schedule(noise_multiplier)
        bounds = tuple(_squared_bound(self.bits, value) for value in noise.values)
        return Schedule(bounds, noise.lengths)

    def _steps_per_vote(self, noise_multiplier: float, batch: int) -> int:
        squared = (4**self.bits - SMOOTHING) / fractions.Fraction(noise_multiplier) ** 2
        steps = min(math.isqrt(math.floor(squared)), 2**24 - 1)
        if steps == 0:
            raise ValueError(
                f"the grid is too coarse for a count with noise of {noise_multiplier / 2:g}. Pass "
                f"DiscreteGaussian(bits=b) with more than {self.bits} bits, or less count_noise."
            )
        if batch * steps + NOISE_ROOM * 2**self.bits > 2**31:
            raise ValueError(
                f"a sum of {batch} votes of {steps} grid steps may not fit into 32 bits. Pass "
                f"DiscreteGaussian(bits=b) with less than {self.bits} bits."
            )
        return steps

    def _check_room(self, batch: int, dimension: int, squared_bounds: Schedule) -> None:
        smallest, largest = math.sqrt(squared_bounds.min), math.sqrt(squared_bounds.max)
        # Rounding takes sqrt(dimension) / 2 of the bound.
        if math.sqrt(dimension) > smallest:
            raise ValueError(
                f"the grid is too coarse: rounding {dimension} parameters would take more than "
                f"half of the clip bound, which is {smallest:.0f} grid steps. Pass "
                f"DiscreteGaussian(bits=b) with more than {self.bits} bits."
            )
        if batch * largest + NOISE_ROOM * 2**self.bits > 2**31:
            raise ValueError(
                f"a sum of {batch} contributions of {largest:.0f} grid steps may not fit into 32 "
                f"bits. Pass DiscreteGaussian(bits=b) with less than {self.bits} bits."
            )


def _squared_bound(bits: int, noise_multiplier: float) -> float:
    """A float32 at most (4**bits - SMOOTHING) / noise_multiplier**2 * (1 - SHORTFALL)."""
    bound = (4**bits - SMOOTHING) / fractions.Fraction(noise_multiplier) ** 2 * (1 - SHORTFALL)
    rounded = np.float32(float(bound))
    while fractions.Fraction(float(rounded)) > bound:
        rounded = np.nextafter(rounded, np.float32(0))
    return float(rounded)


def _relative_norms(weights: list[Array], squared_norms: list[Array], l2_clip: Array) -> Array:
    """Returns the norm of each example's weighted gradient, as a part of the clip bound."""
    parts = [
        # Selected, because zero times infinity is NaN.
        jnp.where(weight != 0, weight * jnp.sqrt(squared).astype(jnp.float32), 0) / l2_clip
        for weight, squared in zip(weights, squared_norms, strict=True)
    ]
    return jnp.sqrt(sum(jnp.square(part) for part in parts))


def _sums_of_squares(leaves: list[Any]) -> Float[Array, " batch"]:
    """Returns sums of squares by row, added in a tree."""
    # A tree of L levels rounds L times, where a sum from left to right would round once per
    # parameter. XLA promises no order, so the order is spelled out.

    def halved(values: Array) -> Array:
        while values.shape[1] > 1:
            even = jnp.pad(values, ((0, 0), (0, values.shape[1] % 2)))
            half = even.shape[1] // 2
            values = even[:, :half] + even[:, half:]
        return values

    flat = [leaf.reshape(len(leaf), math.prod(leaf.shape[1:])) for leaf in leaves]
    sums = [halved(values * values) for values in flat if values.shape[1]]
    return halved(jnp.concatenate(sums, axis=1))[:, 0]
