"""Per-example gradients of a batch: the interface that clipping needs, for every form."""

import abc
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

# From squared norms, `(batch,)` per leaf, to the weight of every example.
WeightsOf: TypeAlias = Callable[[PyTree[Array]], Array]


class PerExampleGrads(abc.ABC):
    """The gradients of all examples of a batch: a pytree to pass to `privatize`.

    A form may hold one array per parameter with a leading example axis, or factors that give norms
    and sums without `batch x params` numbers in memory. Not private: nothing in here is clipped or
    noised.

    Attributes:
        mask: bool `(batch,)`; True marks a real example, False a padded row.
    """

    mask: Array

    def __contains__(self, name: object) -> bool:
        """Returns False: Flax's `TrainState` checks whether gradients contain a collection."""
        return False

    @abc.abstractmethod
    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """Returns the squared L2 norm of every example's gradient, for each parameter leaf.

        Each leaf is float32 `(batch,)`, or float64 for float64 parameters. It is zero for padded
        rows, and not finite where the gradient is not finite.
        """

    def global_squared_norms(self) -> Float[Array, " batch"]:
        """Returns the squared L2 norm of every example's whole gradient: the sum over leaves."""
        return global_squared_norms(self.squared_norms())

    @abc.abstractmethod
    def weighted_sum(self, weights: Float[Array, " batch"]) -> PyTree[Float[Array, "..."]]:
        """Returns `sum_i weights_i * gradient_i`, a tree like the parameters, in float32 or wider.

        An example with zero weight, or a padded row, adds exactly zero, even if its gradient is
        NaN.
        """

    def clip_and_sum(self, weights_of: WeightsOf) -> PyTree[Float[Array, "..."]]:
        """Returns `weighted_sum(weights_of(squared_norms()))`, in one pass if that is cheaper.

        The weight of an example may depend only on its own norms: a form may call `weights_of` on
        a part of the batch at a time.
        """
        return self.sum_by_parts(lambda part: part.weighted_sum(weights_of(part.squared_norms())))

    def sum_by_parts(self, function: Callable[["PerExampleGrads"], PyTree]) -> PyTree:
        """Returns the sum of `function(part)` over parts of the batch: one part, or microbatches.

        `function` must treat each example alone, and return zero for padding: a part with only
        padding may be skipped.
        """
        return function(self)

    @abc.abstractmethod
    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """Returns a plain tree of `(batch, *leaf.shape)` arrays, zero for padded rows."""

    @abc.abstractmethod
    def parameter_specs(self) -> PyTree:
        """Returns the shape and dtype of every parameter, as a tree of `jax.ShapeDtypeStruct`."""


def global_squared_norms(
    squared_norms: PyTree[Float[Array, " batch"]],
) -> Float[Array, " batch"]:
    """Sums squared norms over the leaves. Sensitivity depends on it: no leaf may be left out."""
    leaves = jax.tree.leaves(squared_norms)
    # The norms of float32 leaves and those of float64 leaves may come together.
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    return jnp.stack([leaf.astype(jnp.float64) if wide else leaf for leaf in leaves]).sum(axis=0)


def select(kept: Bool[Array, " batch"], leaf: Array, other: float = 0.0) -> Array:
    """Keeps the rows that are True in `kept`, and replaces the others, NaN included."""
    # Not a product: zero times NaN is NaN.
    rows = kept.reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.where(rows, leaf, jnp.asarray(other, leaf.dtype))
