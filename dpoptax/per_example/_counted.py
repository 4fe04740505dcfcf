"""Counting while summing: an integer per example, summed in the pass that sums the gradients."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpoptax._pytree import PyTree
from dpoptax.per_example._base import PerExampleGrads, global_squared_norms

# From squared norms, `(batch,)` per leaf, and the mask, to the sum of an integer per example.
CountOf: TypeAlias = Callable[[PyTree[Array], Bool[Array, " batch"]], Int[Array, ""]]


class KnownNorms(PerExampleGrads):
    """Gradients of another form, whose norms are computed at most once.

    Attributes:
        norms: the squared norms; None before somebody has asked for them.
    """

    norms: PyTree | None

    def __init__(self, grads: PerExampleGrads) -> None:
        self._grads = grads
        self.mask = grads.mask
        self.norms = None

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""
        if self.norms is None:
            self.norms = self._grads.squared_norms()
        return self.norms

    def weighted_sum(self, weights: PyTree[Float[Array, " batch"]]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        return self._grads.weighted_sum(weights)

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`."""
        return self._grads.stacked()

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return self._grads.parameter_specs()


class CountedGrads(KnownNorms):
    """Gradients of another form, whose examples are counted by the pass that reads their norms.

    Each part of a batch that is summed is also counted. So a count needs no pass of its own, in
    whatever way a mechanism forms its sum.
    """

    def __init__(self, grads: PerExampleGrads, count_of: CountOf) -> None:
        super().__init__(grads)
        self._count_of = count_of
        self._count: Array | None = None

    def sum_by_parts(self, function: Callable[[PerExampleGrads], PyTree]) -> PyTree:
        """See `PerExampleGrads.sum_by_parts`."""

        def with_count(part: PerExampleGrads) -> tuple[PyTree, Array]:
            known = KnownNorms(part)
            return function(known), self._count_of(known.squared_norms(), known.mask)

        total, self._count = self._grads.sum_by_parts(with_count)
        return total

    def readings(self) -> Any:
        """See `PerExampleGrads.readings`."""
        return self._grads.readings()

    def remember(self, readings: Any) -> None:
        """See `PerExampleGrads.remember`."""
        self._grads.remember(readings)

    def count(self) -> Int[Array, ""]:
        """Returns the count of the batch, from a pass that was made already if there is one."""
        if self._count is None:
            self._count = self._count_of(self.squared_norms(), self.mask)
        return self._count


def vote_counter(votes_of: Callable[[PyTree[Array]], Array]) -> CountOf:
    """Returns the sum over real examples of votes, which it limits to -1, 0 and 1."""

    def count(squared_norms: PyTree[Array], mask: Bool[Array, " batch"]) -> Int[Array, ""]:
        # An example with a norm that is not finite adds nothing, here and to the gradients.
        counted = mask & jnp.isfinite(global_squared_norms(squared_norms))
        votes = jnp.clip(votes_of(squared_norms).astype(jnp.int32), -1, 1)
        return jnp.sum(jnp.where(counted, votes, 0), dtype=jnp.int32)

    return count
