"""The interface of a clip rule: weights of examples that bound the sensitivity of a sum."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from dpoptax._pytree import PyTree
from dpoptax.relations import Relation
from dpoptax.schedules import ScalarOrSchedule


@runtime_checkable
class ClipRule(Protocol):
    """The interface of a clip rule: `l2_clip`, `weights` and `sensitivity`.

    The transformation multiplies the gradient of example i by `weights(...)[i]` and adds noise of
    standard deviation `noise_multiplier * l2_clip` to the sum. Write a rule as a frozen class with
    numbers as fields: the noise keys are derived from its fields.

    A rule weighs each example by one number, or by one number per group of parameters. Three laws
    must hold. The weights of an example depend on its own norms only. All of them are zero if one
    of its norms is not finite. The whole contribution of an example has an L2 norm of at most
    `l2_clip`. For groups with contributions of at most C_k that is sqrt(sum of C_k**2).

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
    ) -> PyTree[Float[Array, " batch"]]:
        """Returns the factor of each example, zero or more.

        Args:
            squared_norms: the squared gradient norm of each example, one array per parameter. They
                are upper bounds. A norm below 1e-12 may read as zero.
            step: the number of the release, for a scheduled bound.

        Returns:
            An array `(batch,)`; or a tree prefix of `squared_norms` with one such array per group
            of parameters.
        """

    def sensitivity(self, relation: Relation) -> float:
        """Returns how far neighbouring data sets can move the weighted sum, in L2 norm.

        Args:
            relation: the neighbouring relation; see `dpoptax.relations`.
        """
