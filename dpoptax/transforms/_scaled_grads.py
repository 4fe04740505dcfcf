"""Scaled gradients: per-example gradients times a scale per leaf or per coordinate.

A scale per leaf multiplies norms and sums, so nothing is materialized. A scale per coordinate needs
the gradient of each example: the norm of a scaled gradient does not follow from the factors of a
layer, nor from norms. Then the gradients of a batch are materialized, or those of one microbatch at
a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import widen
from dpoptax._pytree import PyTree
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._base import register_form, select
from dpoptax.per_example._stacked import StackedGrads


@register_form
@dataclasses.dataclass(frozen=True, repr=False)
class ScaledGrads(PerExampleGrads):
    """The gradients `scale * gradient`.

    Attributes:
        mask: bool `(batch,)`; True marks a real example.
        grads: the gradients before scaling.
        scale: a tree like the parameters, of scalars or of arrays that broadcast to them.
    """

    mask: Array
    grads: PerExampleGrads
    scale: PyTree

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""
        if not self._is_by_leaf():
            return self._materialized(self.grads).squared_norms()
        return jax.tree.map(
            lambda norms, s: norms * jnp.square(s).astype(norms.dtype),
            *(self.grads.squared_norms(), self.scale),
        )

    def weighted_sum(self, weights: Any) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        if not self._is_by_leaf():
            return self._materialized(self.grads).weighted_sum(weights)
        return jax.tree.map(
            lambda total, s: total * s.astype(total.dtype),
            *(self.grads.weighted_sum(weights), self.scale),
        )

    def sum_by_parts(self, function: Callable[[PerExampleGrads], PyTree]) -> PyTree:
        """See `PerExampleGrads.sum_by_parts`."""
        if self._is_by_leaf():
            return self.grads.sum_by_parts(
                lambda part: function(ScaledGrads(part.mask, part, self.scale))
            )
        return self.grads.sum_by_parts(lambda part: function(self._materialized(part)))

    def readings(self) -> Any:
        """See `PerExampleGrads.readings`."""
        return self.grads.readings()

    def remember(self, readings: Any) -> None:
        """See `PerExampleGrads.remember`."""
        self.grads.remember(readings)

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`."""
        return self._materialized(self.grads).stacked()

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return self.grads.parameter_specs()

    def _is_by_leaf(self) -> bool:
        return all(leaf.ndim == 0 for leaf in jax.tree.leaves(self.scale))

    def _materialized(self, grads: PerExampleGrads) -> StackedGrads:
        def scaled(leaf: Array, factor: Array) -> Array:
            # Selected after scaling, so that padded rows are zero whatever they hold. Widened, so
            # that the sum is the one of the norms also for 16-bit gradients.
            wide = widen(leaf)
            return select(grads.mask, wide * factor.astype(wide.dtype))

        return StackedGrads(jax.tree.map(scaled, grads.stacked(), self.scale), grads.mask)
