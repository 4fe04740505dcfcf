"""The interface of a clip rule: per-example weights that bound the sensitivity of a sum."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PyTree

from dpoptax.relations import Relation
from dpoptax.schedules import ScalarOrSchedule


@runtime_checkable
class ClipRule(Protocol):
    """The interface of a clip rule: `l2_clip`, `weights` and `sensitivity`.

    The transformation multiplies the gradient of example i by `weights(...)[i]` and adds noise of
    standard deviation `noise_multiplier * l2_clip` to the sum. Write a rule as a frozen class with
    numbers as fields: the noise keys are derived from its fields.

    Three laws must hold. A weight depends on the norms of its own example only. It is zero if a
    norm is not finite. One example more moves the weighted sum by at most `l2_clip` in L2 norm.

    Example:
        >>> import dpoptax
        >>> isinstance(dpoptax.clipping.FlatClip(1.0), ClipRule)
        True
    """

    @property
    def l2_clip(self) -> ScalarOrSchedule:
        """The bound on the L2 norm of one example's contribution, and the unit of the noise."""

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> Float[Array, " batch"]:
        """Returns the factor of each example, in [0, 1].

        Args:
            squared_norms: the squared gradient norm of each example, one array per parameter.
            step: the number of the release, for a scheduled bound.
        """

    def sensitivity(self, relation: Relation) -> float:
        """Returns how far neighbouring data sets can move the weighted sum, in L2 norm.

        Args:
            relation: the neighbouring relation; see `dpoptax.relations`.
        """
