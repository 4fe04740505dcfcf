"""What clipping needs of per-example gradients, whatever form they have."""

import abc
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

# From squared norms, `(batch,)` per leaf, to the weight of every example by its own norms alone.
WeightsOf: TypeAlias = Callable[[PyTree[Array]], Array]


class PerExampleGrads(abc.ABC):
    """The gradients of one batch, example by example: a pytree, to be passed to `privatize`.

    A form may hold one array per parameter with a leading example axis, or factors from which
    norms and sums follow without ever holding `batch x params` numbers. The operations below are
    all that clipping needs. Not private: nothing in here has been clipped or noised.

    Attributes:
        mask: bool `(batch,)`; True marks a real example, False a padded row.
    """

    mask: Array

    def __contains__(self, name: object) -> bool:
        """Returns False: Flax's `TrainState` asks gradients for collections by name."""
        return False

    @abc.abstractmethod
    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """Returns, for each parameter leaf, the squared L2 norm of every example's gradient.

        Float32 `(batch,)` per leaf (float64 for float64 parameters); zero for padded rows, and
        not finite where the gradient is not.
        """

    def global_squared_norms(self) -> Float[Array, " batch"]:
        """Returns the squared L2 norm of every example's whole gradient: the sum over leaves."""
        return global_squared_norms(self.squared_norms())

    @abc.abstractmethod
    def weighted_sum(self, weights: Float[Array, " batch"]) -> PyTree[Float[Array, "..."]]:
        """Returns `sum_i weights_i * gradient_i`, a tree like the parameters, in float32 or wider.

        A zero weight, or a padded row, *selects out* its example: whatever the gradient holds,
        NaN included, it adds exactly zero.
        """

    def clip_and_sum(self, weights_of: WeightsOf) -> PyTree[Float[Array, "..."]]:
        """Returns `weighted_sum(weights_of(squared_norms()))`, in one pass where that is cheaper.

        The weight of an example must follow from its own norms alone: a form may ask for some
        examples now and for others later.
        """
        return self.sum_by_parts(lambda part: part.weighted_sum(weights_of(part.squared_norms())))

    def sum_by_parts(self, function: Callable[["PerExampleGrads"], PyTree]) -> PyTree:
        """Returns the sum of `function(part)` over parts of the batch: one part, or microbatches.

        What `function` makes of an example must follow from that example alone, and be zero for
        padding: a part of nothing else may be left out.
        """
        return function(self)

    @abc.abstractmethod
    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """Returns the plain tree of `(batch, *leaf.shape)` arrays, zero for padded rows."""

    @abc.abstractmethod
    def parameter_specs(self) -> PyTree:
        """Returns a tree like the parameters of `jax.ShapeDtypeStruct`: what a release looks like.

        An empty tree of parameters gives an empty tree.
        """


def global_squared_norms(
    squared_norms: PyTree[Float[Array, " batch"]],
) -> Float[Array, " batch"]:
    """Sums squared norms over the leaves: every leaf counts, or clipping would be too weak."""
    return jnp.stack(jax.tree.leaves(squared_norms)).sum(axis=0)


def select(kept: Bool[Array, " batch"], leaf: Array, other: float = 0.0) -> Array:
    """Keeps the rows marked True, and puts `other` in place of the rest, whatever they hold.

    Args:
            kept: bool `(batch,)`.
            leaf: `(batch, ...)`.
            other: what takes the place of the other rows.

    Returns:
            An array like `leaf`.

    Example:
            >>> import jax
    import jax.numpy as jnp
            >>> select(jnp.array([True, False]), jnp.array([1.0, jnp.nan]))
            Array([1., 0.], dtype=float32)
    """
    rows = kept.reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.where(rows, leaf, jnp.asarray(other, leaf.dtype))
