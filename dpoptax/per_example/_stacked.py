"""The reference form: one array per parameter, with a leading example axis."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dpoptax import _validate
from dpoptax._precision import widen
from dpoptax.per_example._base import PerExampleGrads, select
from dpoptax.per_example._tracing import find_sites as tracing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedGrads(PerExampleGrads):
    """Per-example gradients as `jax.vmap(jax.grad(loss))` gives them.

    Attributes:
        gradients: a tree of `(batch, *leaf.shape)` arrays.
        mask: bool `(batch,)`; True marks a real example.
    """

    # A scan or a vmap stacks them further, so the shapes are told above and not checked here.
    gradients: PyTree
    mask: Array

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""

        def squared_norm(leaf: Array) -> Array:
            wide = widen(leaf)
            return select(self.mask, jnp.sum(wide * wide, axis=tuple(range(1, leaf.ndim))))

        return jax.tree.map(squared_norm, self.gradients)

    def weighted_sum(self, weights: Float[Array, " batch"]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        kept = self.mask & (weights != 0)

        def total(leaf: Array) -> Array:
            wide = select(kept, widen(leaf))
            factors = select(kept, weights).astype(wide.dtype)
            return jnp.tensordot(factors, wide, axes=1, precision=jax.lax.Precision.HIGHEST)

        return jax.tree.map(total, self.gradients)

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`."""
        return jax.tree.map(lambda leaf: select(self.mask, leaf), self.gradients)

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.gradients
        )


def stacked_grads(
    loss_fn: Callable[..., Array], params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Array, PerExampleGrads]:
    """Returns the losses and the stacked gradients of a batch.

    Args:
        loss_fn: the scalar loss of one example, `loss_fn(params, *input)`.
        params: the parameters.
        inputs: the examples, and their keys where the loss draws, with a leading axis.
        mask: bool `(batch,)`.

    Returns:
        Losses `(batch,)` and `StackedGrads`.
    """

    def of_example(inputs: tuple[PyTree, ...]) -> tuple[Array, PyTree]:
        return jax.value_and_grad(loss_fn)(params, *inputs)

    found = jax.vmap(of_example)(inputs)
    if jax.tree.leaves(params) and tracing.has_convolution(loss_fn, params, inputs):
        found = isolated(of_example, found, inputs, mask)
    losses, gradients = found
    return losses, StackedGrads(gradients, mask)


def isolated(
    function: Callable[[Any], PyTree], results: PyTree, inputs: Any, mask: Array
) -> PyTree:
    """Keeps an example that is not finite from spoiling the results of others.

    `vmap` turns a convolution whose kernel differs by example, and the gradient of any kernel, into
    one convolution in as many groups as there are examples, and XLA multiplies across groups by
    zero: NaN in one example is NaN in all.

    Args:
        function: of one example.
        results: those of all examples by `vmap`, `(batch, ...)`.
        inputs: the examples, with a leading axis.
        mask: bool `(batch,)`.

    Returns:
        `results`, or where any is not finite the same computed one example at a time.
    """
    finite = [jnp.all(jnp.isfinite(select(mask, leaf))) for leaf in jax.tree.leaves(results)]
    return jax.lax.cond(
        jnp.all(jnp.stack(finite)), lambda: results, lambda: jax.lax.map(function, inputs)
    )


def as_per_example_grads(updates: Any, params: Any = None) -> PerExampleGrads:
    """Returns `updates` itself if it is `PerExampleGrads`, else the plain tree in stacked form.

    Args:
        updates: `PerExampleGrads`, or a tree of arrays with a leading example axis.
        params: the parameters, where known, to check the shapes against.

    Returns:
        Per-example gradients in some form.

    Raises:
        TypeError: a leaf is not of real floating-point numbers.
        ValueError: the leaves share no leading axis, or do not fit the parameters. A gradient that
            is summed or averaged already cannot be clipped per example.

    Example:
        >>> import jax.numpy as jnp
        >>> as_per_example_grads({"w": jnp.ones((8, 3))}).parameter_specs()
        {'w': ShapeDtypeStruct(shape=(3,), dtype=float32)}
    """
    grads = updates if isinstance(updates, PerExampleGrads) else _stack(updates)
    if params is not None:
        _refuse_mismatch(grads.parameter_specs(), params)
    return grads


def _stack(gradients: PyTree) -> StackedGrads:
    batch = _validate.leading_axis_size("updates", gradients) if jax.tree.leaves(gradients) else 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                "gradients must be real floating-point arrays; got "
                f"updates{jax.tree_util.keystr(path)} of {dtype}. Pass complex ones as two leaves, "
                "real and imaginary."
            )
    return StackedGrads(jax.tree.map(jnp.asarray, gradients), jnp.ones((batch,), bool))


def _refuse_mismatch(specs: PyTree, params: PyTree) -> None:
    structure: Any = jax.tree.structure(specs)
    expected: Any = jax.tree.structure(params)
    if structure != expected:
        raise ValueError(
            "per-example gradients and parameters must be trees of one structure; got "
            f"{structure} and {expected}."
        )
    labelled = jax.tree_util.tree_leaves_with_path(specs)
    for (path, spec), param in zip(labelled, jax.tree.leaves(params), strict=True):
        if spec.shape != jnp.shape(param):
            raise ValueError(
                f"the gradient of params{jax.tree_util.keystr(path)} must have shape (batch, "
                f"*{jnp.shape(param)}); got (batch, *{spec.shape}). A gradient that is summed or "
                "averaged already cannot be clipped per example: use dpoptax.per_example_grads."
            )
