"""Canaries in gradient space: rows of a batch whose gradient is a given sparse vector."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpoptax._jax_compat import current_trace
from dpoptax._precision import widen
from dpoptax._pytree import PyTree
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._base import register_form, select
from dpoptax.per_example._leaf_weights import weights_by_leaf


class SparseVectors(NamedTuple):
    """Vectors like the parameters, each with at most one coordinate in each leaf.

    Attributes:
        positions: for each leaf, int32 `(count, ndim)`: the coordinate of each vector.
        values: for each leaf, float32 `(count,)`: its value; zero if it has none in this leaf.
        directions: the same for the vector that remains after the clip, at length one.
    """

    positions: list[Int[Array, "count ndim"]]
    values: list[Float[Array, " count"]]
    directions: list[Float[Array, " count"]]

    def products(self, tree: PyTree) -> Float[Array, " count"]:
        """Returns the inner product of each direction with a tree like the parameters."""
        total = jnp.zeros(len(self.values[0]), jnp.float32)
        for leaf, at, direction in zip(
            jax.tree.leaves(tree), self.positions, self.directions, strict=True
        ):
            found = leaf[tuple(at.T)].astype(jnp.float32)
            total += jnp.where(direction != 0, found * direction, 0.0)
        return total


@register_form
@dataclasses.dataclass(frozen=True, repr=False)
class CanaryGrads(PerExampleGrads):
    """Gradients of another form, with the gradients of canaries in some rows.

    It needs no `batch x params` numbers: a canary is added to a sum at its coordinates. A sum also
    gives the share of all other rows in the coordinates of the canaries, see `share_of_others`.

    Attributes:
        mask: bool `(batch,)`; True marks a real example or a canary.
        grads: the gradients of all rows. Those of rows with a canary have no meaning.
        slots: int32 `(batch,)`, the number of the canary in each row; -1 where there is none.
        vectors: of all canaries.
    """

    mask: Array
    grads: PerExampleGrads
    slots: Array
    vectors: SparseVectors

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""
        norms, structure = jax.tree.flatten(self.grads.squared_norms())
        found = [
            jnp.where(self._is_canary, jnp.square(value).astype(norm.dtype), norm)
            for norm, value in zip(norms, self._values(), strict=True)
        ]
        return jax.tree.unflatten(structure, found)

    def weighted_sum(self, weights: PyTree[Float[Array, " batch"]]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        rest = jax.tree.map(lambda leaf: select(~self._is_canary, leaf), weights)
        others = self.grads.weighted_sum(rest)
        # In the dict, because the fields are frozen, and this is not one.
        self.__dict__["_others"] = current_trace(), self.vectors.products(others)
        totals, structure = jax.tree.flatten(others)
        by_leaf = weights_by_leaf(weights, structure, self.mask)
        found = []
        for leaf, at, weight, value in zip(
            totals, self._positions(), by_leaf, self._values(), strict=True
        ):
            added = jnp.where(self._is_canary, weight * value, 0.0).astype(leaf.dtype)
            # A number has no coordinates: all canaries of it are added.
            found.append(leaf.at[at].add(added) if at else leaf + jnp.sum(added))
        return jax.tree.unflatten(structure, found)

    def sum_with_rows(
        self, function: Callable[[PerExampleGrads, Any], PyTree], rows: PyTree
    ) -> PyTree:
        """See `PerExampleGrads.sum_with_rows`. A microbatch has the canaries of its rows."""
        known = []

        def of_part(part: PerExampleGrads, cut: tuple[Array, PyTree]) -> tuple[PyTree, PyTree]:
            slots, rest = cut
            own = CanaryGrads(part.mask, part, slots, self.vectors)
            result, others = function(own, rest), own.share_of_others()
            known.append(others is not None)
            return result, jnp.zeros(()) if others is None else others

        total, others = self.grads.sum_with_rows(of_part, (self.slots, rows))
        if all(known):
            self.__dict__["_others"] = current_trace(), others
        return total

    def share_of_others(self) -> Float[Array, " count"] | None:
        """Returns the inner products of the directions with the last sum, without canaries.

        None if there was no sum in this trace, or one that was made from stacked gradients.
        """
        trace, others = self.__dict__.get("_others", (None, None))
        return others if trace == current_trace() else None

    def readings(self) -> Any:
        """See `PerExampleGrads.readings`."""
        return self.grads.readings()

    def remember(self, readings: Any) -> None:
        """See `PerExampleGrads.remember`."""
        self.grads.remember(readings)

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`; in float32 or wider, which a canary may need."""
        leaves, structure = jax.tree.flatten(self.grads.stacked())
        rows = jnp.arange(len(self.mask))
        found = []
        for leaf, at, value in zip(leaves, self._positions(), self._values(), strict=True):
            rest = select(~self._is_canary, widen(leaf))
            added = jnp.where(self._is_canary, value, 0.0).astype(rest.dtype)
            found.append(rest.at[(rows, *at)].add(added))
        return jax.tree.unflatten(structure, found)

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return self.grads.parameter_specs()

    @property
    def _is_canary(self) -> Bool[Array, " batch"]:
        return self.mask & (self.slots >= 0)

    def _values(self) -> list[Array]:
        return [value[self.slots] for value in self.vectors.values]

    def _positions(self) -> list[tuple[Array, ...]]:
        # Rows without a canary read the last one, and add zero.
        return [tuple(at[self.slots].T) for at in self.vectors.positions]
