"""Per-sample adaptive clipping (PSAC): scaling to one norm that spares small gradients."""

import attrs
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._pytree import PyTree
from dpoptax.clipping._bound import norms_and_finite, scaling_bound, sensitivity_of, stability
from dpoptax.relations import Relation
from dpoptax.schedules import ScalarOrSchedule, as_schedule, validated


@attrs.frozen(init=False)
class PsacClip:
    """Scales the gradient of each example by `l2_clip / (||g|| + r / (||g|| + r))`.

    Large gradients are scaled to `l2_clip`, as by `AutoSClip`. Small ones are scaled up by less:
    with r = 0.1 the largest weight is 1.9 times `l2_clip`, where `AutoSClip` has 100 times
    `l2_clip`. So examples that are fitted already do not dominate the sum. An example with a
    gradient that is not finite contributes zero.

    Attributes:
        l2_clip: what large norms are scaled to. It may be a `Schedule`.
        r: the stability constant, in the unit of the gradient. The paper takes 0.01 and 0.1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = PsacClip(1.0)
        >>> norms = jnp.array([0.0, 0.01, 1.0])
        >>> [round(float(norm), 2) for norm in norms * rule.weights({"w": norms**2})]
        [0.0, 0.01, 0.92]

    Reference: Xia et al. 2023, arXiv:2212.00328, algorithm 1.
    """

    l2_clip: ScalarOrSchedule
    r: float

    def __init__(self, l2_clip: ScalarOrSchedule = 1.0, r: float = 0.1) -> None:
        self.__attrs_init__(validated("l2_clip", l2_clip, scaling_bound), stability("r", r))

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> Float[Array, " batch"]:
        """Returns the weight above, and 0 for an example with a norm that is not finite."""
        norms, finite = norms_and_finite(squared_norms)
        scale = as_schedule(self.l2_clip).at(step) / (norms + self.r / (norms + self.r))
        return jnp.where(finite, scale, 0.0)

    def sensitivity(self, relation: Relation) -> float:
        """Returns l2_clip, or twice that if one example replaces another.

        An example adds a vector of norm l2_clip * n / (n + r / (n + r)) for n = ||g||. The second
        term of the divisor is positive, so this is below l2_clip for every n, and approaches it for
        large n. The weight itself has a maximum, which bounds nothing: l2_clip / (2 sqrt(r) - r) at
        n = sqrt(r) - r.

        The computed norm is at least n, except that squares below 1e-38 vanish in float32. In a
        model of d parameters this hides a norm of at most sqrt(d) * 1e-19. If the computed norm is
        below r, the divisor is at least 1/2. Otherwise it is at least r >= 1e-12. Both exceed what
        is hidden by far.
        """
        return sensitivity_of(self.l2_clip, relation)
