"""The interface of a clip rule: per-example weights that bound the sensitivity of a sum."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PyTree

from dpoptax.relations import Relation
from dpoptax.schedules import Scheduled


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
