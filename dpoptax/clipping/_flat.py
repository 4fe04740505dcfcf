"""Squared norms of per-example gradients in; one weight per example out.

Clipping scales the gradient of example i by `weight_i = min(1, l2_clip / norm_i)`, so that no
example moves the sum by more than `l2_clip` (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).
A rule states its sensitivity beside the code that makes it true.
"""

import dataclasses

import jax
import jax.numpy as jnp
from dp_accounting import NeighboringRelation
from jaxtyping import Array, Float, Int, PyTree

from dpoptax import _validate
from dpoptax.clipping._base import ClipRule
from dpoptax.relations import Relation, parse_relation
from dpoptax.schedules import Schedule, Scheduled, at, extremes

# Squares of smaller float32 numbers vanish, and so would the norms of gradients that small.
SMALLEST_CLIP = 1e-12


@dataclasses.dataclass(frozen=True)
class FlatClip:
    """Clips the gradient of each example, all parameters together, to norm `l2_clip`.

    The contribution of an example becomes `g * min(1, l2_clip / ||g||)`. An example whose
    gradient is not finite, or whose norm exceeds about 1.8e19 (its square overflows float32),
    contributes zero. Norms are float32 sums of squares at the highest matmul precision: a
    contribution exceeds the bound by at most about one part in 1e5, or where its terms cancel to
    less than a thousandth of themselves, three in 100.

    Attributes:
        l2_clip: the bound, in the unit of the gradient; `math.inf` turns clipping off, which
            only a transformation without noise accepts. A `Schedule` changes it with the step,
            and the noise with it, which costs nothing: privacy depends on their ratio.

    Raises:
        ValueError: `l2_clip` is not positive, or too small for float32.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = FlatClip(2.0)
        >>> rule.weights({"w": jnp.array([1.0, 16.0]), "b": jnp.array([0.0, 0.0])})
        Array([1. , 0.5], dtype=float32)
        >>> rule.sensitivity("add_or_remove_one"), rule.sensitivity("replace_one")
        (2.0, 4.0)

    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """

    l2_clip: Scheduled

    def __post_init__(self) -> None:
        bound = self.l2_clip
        if isinstance(bound, Schedule):
            for value in bound.values:
                FlatClip(value)
            return
        bound = _validate.real("l2_clip", bound)
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


def as_clip_rule(clip: ClipRule | Scheduled) -> ClipRule:
    """Returns `clip` itself if it is a rule, `FlatClip(clip)` if it is a number.

    Args:
        clip: a rule, or the bound of `FlatClip`.

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
        return FlatClip(clip)
    _, largest = extremes(clip.l2_clip)
    moves = clip.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE)
    if moves > largest:
        raise ValueError(
            f"noise is a multiple of l2_clip, which is {largest} for {clip!r}, yet one example "
            f"more moves the sum by {moves}: make l2_clip as large as that."
        )
    return clip
