"""Discrete Gaussian mechanism: integer sums and exact noise on a grid."""

import dataclasses
import fractions
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax import _validate
from dpoptax._precision import widen
from dpoptax.clipping import ClipRule
from dpoptax.mechanisms._base import noise_stddev
from dpoptax.per_example._base import PerExampleGrads, select
from dpoptax.random._discrete_gaussian import MOST_BITS, discrete_gaussian
from dpoptax.schedules import Schedule, Scheduled, at, extremes

# What rounded sums of squares may be short of: (levels of the tree + 2) * 2**-24, for 120 levels.
SHORTFALL = fractions.Fraction(1, 2**17)
# The variance, in squared grid steps, that the proof in `DiscreteGaussian` gives away.
SMOOTHING = 9


@dataclasses.dataclass(frozen=True)
class DiscreteGaussian:
    """Noise of the discrete Gaussian law on a grid, and sums of whole numbers.

    The contribution of an example is clipped, scaled to the grid and rounded; its bound is
    tightened by the most that rounding can add, sqrt(parameters) / 2 grid steps, and a contribution
    whose squared norm exceeds the bound all the same adds nothing. Sums are integers, noise is
    `dpoptax.random.discrete_gaussian`: nowhere is a guarantee left to the rounding of floats.

    It is accounted as Gaussian noise of the same multiplier z, under every sampler and relation.
    With s = 2**bits the bound is B = sqrt(s**2 - 9) / z grid steps. Take continuous noise
    x ~ N(0, s**2 - 9) on an integer sum, which is the Gaussian mechanism of multiplier z, and round
    it at random to a whole number k with probability proportional to exp(-(k - x)**2 / 18):
    post-processing. By Poisson summation the constant of proportionality is the same for all x to
    a relative 4 exp(-18 pi**2) < 1e-76, so k has the discrete Gaussian law of variance s**2 to as
    much. A run of 1e6 steps on 1e12 parameters thus costs 1e-57 of epsilon more.

    It takes the stacked form of the gradients, `(batch, parameters)` numbers, so pass
    `microbatch_size` to `per_example_grads` for large models; and each number of noise costs about
    forty words of random bits.

    Attributes:
        bits: the standard deviation of the noise is 2**bits grid steps; from 4 to 24. More make
            rounding cheaper, fewer leave more room in the 32 bits of a sum.

    Raises:
        TypeError: bits that are not whole.
        ValueError: bits out of range; when used, no noise, or a grid too coarse or too fine for
            the model.

    Example:
        >>> import dpoptax, jax
        >>> tx = dpoptax.privatize(1.0, 1.1, expected_batch_size=32, key=jax.random.key(0), mechanism=dpoptax.mechanisms.DiscreteGaussian())

    Reference: Canonne, Kamath and Steinke 2020, arXiv:2004.00010; Kairouz, Liu and Steinke 2021,
    arXiv:2102.06387, for rounding; Micciancio and Regev 2007 for the sum of the two laws.
    """

    bits: int = 16

    def __post_init__(self) -> None:
        bits = _validate.count("bits", self.bits, at_least=4)
        if bits > MOST_BITS:
            raise ValueError(f"bits must be at most {MOST_BITS}; got {bits}.")
        object.__setattr__(self, "bits", bits)

    @property
    def caveat(self) -> str:
        """See `Mechanism.caveat`."""
        return (
            f"noise is a discrete Gaussian of 2**{self.bits} grid steps, exact if its bits are "
            "random; sums are of whole numbers"
        )

    def release(
        self,
        key: PRNGKeyArray,
        grads: PerExampleGrads,
        clip: ClipRule,
        noise_multiplier: Scheduled,
        step: Int[Array, ""] | int,
    ) -> PyTree[Float[Array, "..."]]:
        """See `Mechanism.release`."""
        specs = jax.tree.leaves(grads.parameter_specs())
        dimension = sum(math.prod(spec.shape) for spec in specs)
        self._check_room(len(grads.mask), dimension, noise_multiplier)
        squared_bound = jnp.asarray(at(self._squared_bounds(noise_multiplier), step), jnp.float32)
        bound = jnp.sqrt(squared_bound)
        # Rounding adds at most so much to a norm.
        free = bound - math.sqrt(dimension) / 2
        steps_per_unit = bound / jnp.asarray(at(clip.l2_clip, step), jnp.float32)

        def whole_sum(part: PerExampleGrads) -> PyTree[Array]:
            squared_norms = part.squared_norms()
            weights = clip.weights(squared_norms, step).astype(jnp.float32)
            squared = jnp.stack(jax.tree.leaves(squared_norms)).sum(axis=0)
            norms = jnp.sqrt(squared).astype(jnp.float32)
            factors = jnp.minimum(weights * steps_per_unit, free / norms)
            kept = part.mask & (weights != 0)

            def rounded(leaf: Array) -> Array:
                rows = factors.reshape(-1, *[1] * (leaf.ndim - 1))
                return jnp.rint(select(kept, widen(leaf).astype(jnp.float32) * rows))

            whole = jax.tree.map(rounded, part.stacked())
            # Whatever floating point did above, what is summed is within the bound.
            within = _sums_of_squares(jax.tree.leaves(whole)) <= squared_bound
            return jax.tree.map(
                lambda leaf: select(within, leaf).astype(jnp.int32).sum(axis=0, dtype=jnp.int32),
                whole,
            )

        leaves, treedef = jax.tree.flatten(grads.sum_by_parts(whole_sum))
        keys = jax.random.split(key, len(leaves))
        noisy = []
        for leaf_key, leaf, spec in zip(keys, leaves, specs, strict=True):
            # Beyond 32 bits both wrap around, which is a function of the exact release.
            released = leaf + discrete_gaussian(leaf_key, leaf.shape, bits=self.bits)
            dtype = widen(jnp.zeros((), spec.dtype)).dtype
            noisy.append(released.astype(dtype) / steps_per_unit.astype(dtype))
        return jax.tree.unflatten(treedef, noisy)

    def check(self, clip: ClipRule, noise_multiplier: Scheduled) -> None:
        """See `Mechanism.check`."""
        noise_stddev(clip, noise_multiplier)
        least, _ = extremes(noise_multiplier)
        if least == 0:
            raise ValueError(
                "exact noise needs a positive noise_multiplier, which sets the grid; got 0. "
                "Without noise, leave the mechanism out."
            )

    def _squared_bounds(self, noise_multiplier: Scheduled) -> Scheduled:
        """The most that the squared norm of a contribution may be, in grid steps, by step."""
        if isinstance(noise_multiplier, Schedule):
            bounds = tuple(_squared_bound(self.bits, value) for value in noise_multiplier.values)
            return Schedule(bounds, noise_multiplier.lengths)
        return _squared_bound(self.bits, noise_multiplier)

    def _check_room(self, batch: int, dimension: int, noise_multiplier: Scheduled) -> None:
        least, most = map(math.sqrt, extremes(self._squared_bounds(noise_multiplier)))
        if math.sqrt(dimension) > least:
            raise ValueError(
                f"the grid is too coarse: rounding {dimension} parameters would take more than "
                f"half of the clip bound, which is {least:.0f} grid steps. Pass "
                f"DiscreteGaussian(bits=b) with more than {self.bits} bits."
            )
        if batch * most + 16 * 2**self.bits > 2**31:
            raise ValueError(
                f"a sum of {batch} contributions of {most:.0f} grid steps may not fit into 32 "
                f"bits. Pass DiscreteGaussian(bits=b) with less than {self.bits} bits."
            )


def _squared_bound(bits: int, noise_multiplier: float) -> float:
    """A float32 at most (4**bits - SMOOTHING) / noise_multiplier**2 * (1 - SHORTFALL)."""
    bound = (4**bits - SMOOTHING) / fractions.Fraction(noise_multiplier) ** 2 * (1 - SHORTFALL)
    rounded = np.float32(float(bound))
    while fractions.Fraction(float(rounded)) > bound:
        rounded = np.nextafter(rounded, np.float32(0))
    return float(rounded)


def _sums_of_squares(leaves: list[Any]) -> Float[Array, " batch"]:
    """Sums of squares by row, halving level by level, so that their rounding is bounded."""

    def halved(values: Array) -> Array:
        while values.shape[1] > 1:
            even = jnp.pad(values, ((0, 0), (0, values.shape[1] % 2)))
            half = even.shape[1] // 2
            values = even[:, :half] + even[:, half:]
        return values

    flat = [leaf.reshape(len(leaf), math.prod(leaf.shape[1:])) for leaf in leaves]
    sums = [halved(values * values) for values in flat if values.shape[1]]
    return halved(jnp.concatenate(sums, axis=1))[:, 0]
