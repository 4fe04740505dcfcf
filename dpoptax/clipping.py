"""Squared norms of per-example gradients in; one weight per example out.

Clipping scales the gradient of example i by `weight_i = min(1, l2_clip / norm_i)`, so that no
example moves the sum by more than `l2_clip` (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).
A rule states its sensitivity beside the code that makes it true.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from dp_accounting import NeighboringRelation
from jaxtyping import Array, Float, Int, PyTree

from dpoptax import _checks
from dpoptax.relations import Relation, parse_relation
from dpoptax.schedules import Piecewise, Scheduled, at, extremes

# Squares of smaller float32 numbers vanish, and so would the norms of gradients that small.
SMALLEST_CLIP = 1e-12


@runtime_checkable
class ClipRule(Protocol):
    """What `privatize` asks of a clip rule."""

    @property
    def l2_clip(self) -> Scheduled:
        """The bound on the L2 norm of one example's contribution, and the unit of the noise."""

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> Float[Array, " batch"]:
        """The factor for each example, in [0, 1], which follows from its own norms alone."""

    def sensitivity(self, relation: Relation) -> float:
        """The most that neighbouring data sets can move the clipped sum, in L2 norm."""


@dataclasses.dataclass(frozen=True)
class FlatClip:
    """One bound on the norm of the whole gradient; made by `flat`."""

    l2_clip: Scheduled

    def __post_init__(self) -> None:
        bound = self.l2_clip
        if isinstance(bound, Piecewise):
            for value in bound.values:
                FlatClip(value)
            return
        bound = _checks.real("l2_clip", bound)
        if bound <= 0:
            raise ValueError(f"l2_clip bounds a norm and must be positive; got {bound}.")
        if bound < SMALLEST_CLIP:
            raise ValueError(
                f"l2_clip must be at least {SMALLEST_CLIP}: float32 squares vanish below; "
                f"got {bound}. Scale the loss up instead."
            )
        object.__setattr__(self, "l2_clip", bound)

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> Float[Array, " batch"]:
        """Returns min(1, l2_clip / norm), and 0 for an example whose norm is not finite."""
        squared = jnp.stack(jax.tree.leaves(squared_norms)).sum(axis=0)
        # A norm of zero gives inf here, and min(1, inf) is 1: nothing to clip.
        scale = jnp.minimum(1.0, at(self.l2_clip, step) / jnp.sqrt(squared))
        return jnp.where(jnp.isfinite(squared), scale, 0.0)

    def sensitivity(self, relation: Relation) -> float:
        """Returns l2_clip, or twice that where one example takes the place of another."""
        replaced = parse_relation(relation) is NeighboringRelation.REPLACE_ONE
        _, largest = extremes(self.l2_clip)
        return 2 * largest if replaced else largest


def flat(l2_clip: Scheduled) -> FlatClip:
    """Clips the gradient of each example, all parameters together, to norm `l2_clip`.

    The contribution of an example becomes `g * min(1, l2_clip / ||g||)`. An example whose
    gradient is not finite, or whose norm exceeds about 1.8e19 (its square overflows float32),
    contributes zero. Norms are float32 sums of squares at the highest matmul precision: a
    contribution exceeds the bound by at most about one part in 1e5, or where its terms cancel to
    less than a thousandth of themselves, three in 100.

    Args:
        l2_clip: the bound, in the unit of the gradient; `math.inf` turns clipping off, which
            only a transformation without noise accepts. A `Piecewise` changes it with the step,
            and the noise with it, which costs nothing: privacy depends on their ratio.

    Returns:
        A frozen rule with `l2_clip`, `weights(squared_norms)` and `sensitivity(relation)`.

    Raises:
        ValueError: `l2_clip` is not positive, or too small for float32.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = flat(2.0)
        >>> rule.weights({"w": jnp.array([1.0, 16.0]), "b": jnp.array([0.0, 0.0])})
        Array([1. , 0.5], dtype=float32)
        >>> rule.sensitivity("add_or_remove_one"), rule.sensitivity("replace_one")
        (2.0, 4.0)

    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    return FlatClip(l2_clip)


def as_clip_rule(clip: ClipRule | Scheduled) -> ClipRule:
    """Returns `clip` itself if it is a rule, `flat(clip)` if it is a number.

    Args:
        clip: a rule, or the bound of `flat`.

    Returns:
        A clip rule.

    Raises:
        ValueError: a bound that is not positive; or a rule by which one example moves the sum by
            more than its `l2_clip`, the unit of the noise.

    Example:
        >>> as_clip_rule(1.5)
        FlatClip(l2_clip=1.5)
    """
    if not isinstance(clip, ClipRule):
        return flat(clip)
    _, largest = extremes(clip.l2_clip)
    moves = clip.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE)
    if moves > largest:
        raise ValueError(
            f"noise is a multiple of l2_clip, which is {largest} for {clip!r}, yet one example "
            f"more moves the sum by {moves}: make l2_clip as large as that."
        )
    return clip


def noise_stddev(
    clip: ClipRule, noise_multiplier: Scheduled, step: Int[Array, ""] | int = 0
) -> float | Float[Array, ""]:
    """Returns the standard deviation of the noise on the clipped sum: multiplier times bound.

    Args:
        clip: the rule that clips.
        noise_multiplier: zero or more.
        step: where one of the two is a schedule.

    Returns:
        A number in the unit of the gradient.

    Raises:
        ValueError: the bound is infinite and the multiplier is not zero.

    Example:
        >>> noise_stddev(flat(2.0), 1.5)
        3.0
    """
    _, most_noise = extremes(noise_multiplier)
    if most_noise == 0:
        return 0.0
    _, largest = extremes(clip.l2_clip)
    if math.isinf(largest):
        raise ValueError(
            f"noise needs a finite l2_clip to be scaled by; got l2_clip=inf with "
            f"noise_multiplier={most_noise}. Pass a finite clip, or noise_multiplier=0."
        )
    return at(noise_multiplier, step) * at(clip.l2_clip, step)
