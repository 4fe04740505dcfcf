"""What clipping needs of per-example gradients, whatever form they have."""

import abc

from jaxtyping import Array, Float, PyTree


class PerExampleGrads(abc.ABC):
    """The gradients of one batch, example by example: a pytree, to be passed to `privatize`.

    A form may hold one array per parameter with a leading example axis, or factors from which
    norms and sums follow without ever holding `batch x params` numbers. The operations below are
    all that clipping needs. Not private: nothing in here has been clipped or noised.

    Attributes:
        mask: bool `(batch,)`; True marks a real example, False a padded row.
    """

    mask: Array

    @abc.abstractmethod
    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """Returns, for each parameter leaf, the squared L2 norm of every example's gradient.

        Float32 `(batch,)` per leaf (float64 for float64 parameters); zero for padded rows, and
        not finite where the gradient is not.
        """

    @abc.abstractmethod
    def weighted_sum(self, weights: Float[Array, " batch"]) -> PyTree[Float[Array, "..."]]:
        """Returns `sum_i weights_i * gradient_i`, a tree like the parameters, in float32 or wider.

        A zero weight, or a padded row, *selects out* its example: whatever the gradient holds,
        NaN included, it adds exactly zero.
        """

    @abc.abstractmethod
    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """Returns the plain tree of `(batch, *leaf.shape)` arrays, zero for padded rows."""

    @abc.abstractmethod
    def parameter_specs(self) -> PyTree:
        """Returns a tree like the parameters of `jax.ShapeDtypeStruct`: what a release looks like.

        An empty tree of parameters gives an empty tree.
        """
