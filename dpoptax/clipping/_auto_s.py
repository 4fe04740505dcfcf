"""Automatic clipping (AUTO-S): all gradients are scaled to nearly the same norm."""

import attrs
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._pytree import PyTree
from dpoptax.clipping._bound import norms_and_finite, scaling_bound, sensitivity_of, stability
from dpoptax.relations import Relation
from dpoptax.schedules import ScalarOrSchedule, as_schedule, validated


@attrs.frozen(init=False)
class AutoSClip:
    """Scales the gradient of each example by `l2_clip / (||g|| + gamma)`.

    There is no bound to tune: another `l2_clip` changes the release by a factor, which a learning
    rate undoes, and which Adam does not see. Gradients that are much smaller than `gamma` keep
    their relative sizes, so training can converge. An example with a gradient that is not finite
    contributes zero.

    Attributes:
        l2_clip: what the norms are scaled to, nearly. It may be a `Schedule`.
        gamma: the stability constant, in the unit of the gradient.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = AutoSClip(1.0)
        >>> norms = jnp.array([0.0, 0.01, 0.99])
        >>> [round(float(norm), 2) for norm in norms * rule.weights({"w": norms**2})]
        [0.0, 0.5, 0.99]

    Reference: Bu, Wang, Zha and Karypis 2023, arXiv:2206.07136, section 4.
    """

    l2_clip: ScalarOrSchedule
    gamma: float

    def __init__(self, l2_clip: ScalarOrSchedule = 1.0, gamma: float = 0.01) -> None:
        self.__attrs_init__(validated("l2_clip", l2_clip, scaling_bound), stability("gamma", gamma))

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> Float[Array, " batch"]:
        """Returns l2_clip / (norm + gamma), and 0 for an example with a norm that is not finite."""
        norms, finite = norms_and_finite(squared_norms)
        scale = as_schedule(self.l2_clip).at(step) / (norms + self.gamma)
        return jnp.where(finite, scale, 0.0)

    def sensitivity(self, relation: Relation) -> float:
        """Returns l2_clip, or twice that if one example replaces another.

        An example adds a vector of norm l2_clip * n / (n + gamma) < l2_clip, for n = ||g||. The
        computed norm is at least n, except that squares below 1e-38 vanish in float32. In a model
        of d parameters this hides a norm of at most sqrt(d) * 1e-19, which gamma >= 1e-12 exceeds.
        """
        return sensitivity_of(self.l2_clip, relation)
