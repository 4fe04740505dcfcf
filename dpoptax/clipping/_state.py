"""The interface of a clip rule with state: its bound follows what the run has released so far."""

from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float, Int

from dpoptax._pytree import PyTree
from dpoptax.clipping._base import ClipRule


@runtime_checkable
class StatefulClipRule(Protocol):
    """The interface of a clip rule with state: `init`, `at`, `votes`, `update` and `count_noise`.

    At each step every example has a vote of -1, 0 or 1, by its gradient norms. The transformation
    releases the sum of the votes with noise, together with the gradient, and the rule computes its
    next state from this release. So the state is private, and depends on nothing else. It travels
    in the state of the transformation.

    Both releases of a step together cost what the `noise_multiplier` of the plan says. The noise on
    the gradient is larger than that of a rule without state: `docs/accounting.md` derives by how
    much. Write a rule as a frozen class with numbers as fields: the noise keys are derived from its
    fields.

    Two laws must hold. The vote of an example depends on its own norms and the state only. The next
    state depends on the arguments of `update` only, and never on data.

    Example:
        >>> import dpoptax
        >>> isinstance(dpoptax.clipping.QuantileClip(1.0), StatefulClipRule)
        True
    """

    @property
    def count_noise(self) -> float | None:
        """Half the standard deviation of the noise on the sum of the votes; None chooses it.

        A count of examples is half of a sum of votes, up to a public number. So this is the noise
        on a count, in examples.
        """

    def init(self) -> PyTree:
        """Returns the state before the first step: a small tree of float32 numbers."""

    def at(self, state: Any) -> ClipRule:
        """Returns the rule of the step that starts from a state. Its `l2_clip` may be traced."""

    def votes(
        self, squared_norms: PyTree[Float[Array, " batch"]], state: Any
    ) -> Int[Array, " batch"]:
        """Returns the vote of each example: -1, 0 or 1.

        An example with a norm that is not finite, and a padded row, have no vote, whatever this
        returns.

        Args:
            squared_norms: the squared gradient norm of each example, one array per parameter.
            state: of this step.
        """

    def update(
        self,
        state: Any,
        noisy_votes: Float[Array, ""],
        expected_batch_size: float | Float[Array, ""],
    ) -> PyTree:
        """Returns the state of the next step.

        Args:
            state: of this step.
            noisy_votes: the sum of the votes, with noise.
            expected_batch_size: the public size of the batch.
        """


# A rule of either kind.
AnyClipRule: TypeAlias = ClipRule | StatefulClipRule
