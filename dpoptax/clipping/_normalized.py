"""Normalized gradients: every gradient is scaled to the same norm, except a gradient of zero."""

import attrs
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._pytree import PyTree
from dpoptax.clipping._bound import SMALLEST_CLIP, norms_and_finite, scaling_bound, sensitivity_of
from dpoptax.relations import Relation
from dpoptax.schedules import ScalarOrSchedule, as_schedule, validated


@attrs.frozen(init=False)
class NormalizedClip:
    """Scales the gradient of each example to norm `l2_clip`, however small it is.

    The contribution of an example becomes `l2_clip * g / ||g||`. It is zero for a gradient of zero,
    for a norm below 1e-12, which float32 squares do not resolve, and for a gradient that is not
    finite. Examples that are fitted already have as much influence as all others: `AutoSClip` and
    `PsacClip` avoid that.

    Attributes:
        l2_clip: the norm of each contribution. It may be a `Schedule`.

    Raises:
        ValueError: `l2_clip` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = NormalizedClip(2.0)
        >>> norms = jnp.array([0.0, 0.01, 10.0])
        >>> (norms * rule.weights({"w": norms**2})).round(3)
        Array([0., 2., 2.], dtype=float32)

    Reference: Yang, Zhang, Chen and Liu 2022, arXiv:2206.13033; Das et al. 2021, arXiv:2106.07094.
    """

    l2_clip: ScalarOrSchedule

    def __init__(self, l2_clip: ScalarOrSchedule = 1.0) -> None:
        self.__attrs_init__(validated("l2_clip", l2_clip, scaling_bound))

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> Float[Array, " batch"]:
        """Returns l2_clip / norm, and 0 for a norm below 1e-12 or one that is not finite."""
        norms, finite = norms_and_finite(squared_norms)
        counts = finite & (norms >= SMALLEST_CLIP)
        return jnp.where(counts, as_schedule(self.l2_clip).at(step) / norms, 0.0)

    def sensitivity(self, relation: Relation) -> float:
        """Returns l2_clip, or twice that if one example replaces another.

        An example adds a vector of norm l2_clip * ||g|| / n, where n is the computed norm. It is at
        least ||g||, except that squares below 1e-38 vanish in float32. In a model of d parameters
        this hides a norm of at most sqrt(d) * 1e-19, which is nothing beside n >= 1e-12.
        """
        return sensitivity_of(self.l2_clip, relation)
