"""Per-example gradients and a clip rule in; their clipped sum with noise out.

A mechanism is how the noise is made. Each is at least as private as noise_multiplier * l2_clip *
N(0, I) on a sum of the clip rule's sensitivity, and accounted as that; they differ in what is taken
on trust, and in time.
"""

import dataclasses
import fractions
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax import _checks
from dpoptax.clipping import ClipRule, noise_stddev
from dpoptax.noise import add_gaussian
from dpoptax.per_example.form import PerExampleGrads, select
from dpoptax.precision import widen
from dpoptax.random.exact import MOST_BITS, discrete_gaussian
from dpoptax.schedules import Piecewise, Scheduled, at, extremes

# What rounded sums of squares may be short of: (levels of the tree + 2) * 2**-24, for 120 levels.
SHORTFALL = fractions.Fraction(1, 2**17)
# The variance, in squared grid steps, that the proof in `exact` gives away.
SMOOTHING = 9


@runtime_checkable
class Mechanism(Protocol):
    """What `privatize` asks of a mechanism."""

    @property
    def trust(self) -> str:
        """What a privacy statement about it takes on trust, for the report."""

    def release(
        self,
        key: PRNGKeyArray,
        grads: PerExampleGrads,
        clip: ClipRule,
        noise_multiplier: Scheduled,
        step: Int[Array, ""] | int,
    ) -> PyTree[Float[Array, "..."]]:
        """Returns the clipped sum with its noise, in float32 or wider."""

    def check(self, clip: ClipRule, noise_multiplier: Scheduled) -> None:
        """Refuses a clip or a noise that cannot be served."""


@dataclasses.dataclass(frozen=True)
class FloatingPoint:
    """Normal draws in floating point; made by `floating_point`."""

    num_normals: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_normals", _checks.count("num_normals", self.num_normals))

    @property
    def trust(self) -> str:
        """See `Mechanism.trust`."""
        drawn = "a floating-point Gaussian"
        if self.num_normals > 1:
            drawn = f"a sum of {self.num_normals} floating-point Gaussians"
        return (
            f"noise is {drawn}, taken for an exact one; by rounding, an example may move sums "
            "3 % beyond the clip"
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
        total = grads.clip_and_sum(functools.partial(clip.weights, step=step))
        stddev = noise_stddev(clip, noise_multiplier, step)
        return add_gaussian(key, total, stddev, num_normals=self.num_normals)

    def check(self, clip: ClipRule, noise_multiplier: Scheduled) -> None:
        """See `Mechanism.check`."""
        noise_stddev(clip, noise_multiplier)


def floating_point(*, num_normals: int = 1) -> FloatingPoint:
    """Noise of normal draws in floating point: the fast way, and the default.

    A normal of float32 takes few enough values that its last bits can betray what it was added to
    (Mironov 2012), all the more where two are drawn together, as here (Jin et al. 2022), and ends
    at 6.8 standard deviations. A sum of several, divided by the root of their number, leaves no
    single draw to be told from the sum (Holohan and Braghin 2021 propose four) and reaches further:
    a hardening, and no proof. See `exact` for that.

    Args:
        num_normals: how many draws make the noise of one coordinate; time grows with it.

    Returns:
        A mechanism for `privatize`.

    Raises:
        TypeError: a number that is not whole.
        ValueError: a number below 1.

    Example:
        >>> import dpoptax, jax
        >>> tx = dpoptax.privatize(
        ...     1.0, 1.1, 32, jax.random.key(0), mechanism=floating_point(num_normals=4)
        ... )

    Reference: Mironov 2012, "On significance of the least significant bits for differential
    privacy"; Holohan and Braghin 2021, arXiv:2107.10138.
    """
    return FloatingPoint(num_normals)


@dataclasses.dataclass(frozen=True)
class Exact:
    """Whole numbers and the discrete Gaussian law; made by `exact`."""

    bits: int

    def __post_init__(self) -> None:
        bits = _checks.count("bits", self.bits, at_least=4)
        if bits > MOST_BITS:
            raise ValueError(f"bits must be at most {MOST_BITS}; got {bits}.")
        object.__setattr__(self, "bits", bits)

    @property
    def trust(self) -> str:
        """See `Mechanism.trust`."""
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
        if isinstance(noise_multiplier, Piecewise):
            bounds = tuple(_squared_bound(self.bits, value) for value in noise_multiplier.values)
            return Piecewise(bounds, noise_multiplier.lengths)
        return _squared_bound(self.bits, noise_multiplier)

    def _check_room(self, batch: int, dimension: int, noise_multiplier: Scheduled) -> None:
        least, most = map(math.sqrt, extremes(self._squared_bounds(noise_multiplier)))
        if math.sqrt(dimension) > least:
            raise ValueError(
                f"the grid is too coarse: rounding {dimension} parameters would take more than "
                f"half of the clip bound, which is {least:.0f} grid steps. Pass "
                f"exact(bits=b) with more than {self.bits} bits."
            )
        if batch * most + 16 * 2**self.bits > 2**31:
            raise ValueError(
                f"a sum of {batch} contributions of {most:.0f} grid steps may not fit into 32 "
                f"bits. Pass exact(bits=b) with less than {self.bits} bits."
            )


def exact(*, bits: int = 16) -> Exact:
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

    Args:
        bits: the standard deviation of the noise is 2**bits grid steps; from 4 to 24. More make
            rounding cheaper, fewer leave more room in the 32 bits of a sum.

    Returns:
        A mechanism for `privatize`.

    Raises:
        TypeError: bits that are not whole.
        ValueError: bits out of range; when used, no noise, or a grid too coarse or too fine for
            the model.

    Example:
        >>> import dpoptax, jax
        >>> tx = dpoptax.privatize(1.0, 1.1, 32, jax.random.key(0), mechanism=exact())

    Reference: Canonne, Kamath and Steinke 2020, arXiv:2004.00010; Kairouz, Liu and Steinke 2021,
    arXiv:2102.06387, for rounding; Micciancio and Regev 2007 for the sum of the two laws.
    """
    return Exact(bits)


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


FLOATING_POINT = floating_point()
