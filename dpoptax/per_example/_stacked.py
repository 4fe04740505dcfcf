"""Stacked gradients: one array per parameter with a leading example axis. The reference form."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax import _validate
from dpoptax._precision import widen
from dpoptax._pytree import PyTree
from dpoptax.per_example._base import PerExampleGrads, Values, register_form, select
from dpoptax.per_example._batch_sum import sum_stacked
from dpoptax.per_example._leaf_weights import kept_by_leaf, weights_by_leaf
from dpoptax.per_example._loss_trace import LossTrace


@register_form
@dataclasses.dataclass(frozen=True, repr=False)
class StackedGrads(PerExampleGrads):
    """Per-example gradients as `jax.vmap(jax.grad(loss))` gives them.

    Attributes:
        gradients: a tree of `(batch, *leaf.shape)` arrays.
        mask: bool `(batch,)`; True marks a real example.
    """

    # No shapes in the annotations: inside a scan or a vmap the arrays have more axes.
    gradients: PyTree
    mask: Array

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""

        def squared_norm(leaf: Array) -> Array:
            # The square of a float16 number overflows at 256.
            wide = widen(leaf)
            return select(self.mask, jnp.sum(wide * wide, axis=tuple(range(1, leaf.ndim))))

        return jax.tree.map(squared_norm, self.gradients)

    def weighted_sum(self, weights: PyTree[Float[Array, " batch"]]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        leaves, structure = jax.tree.flatten(self.gradients)
        by_leaf = weights_by_leaf(weights, structure, self.mask)

        def sum_examples(leaf: Array, weights: Array, kept: Array) -> Array:
            # Rows are selected and not only scaled by zero: zero times NaN is NaN.
            wide = select(kept, widen(leaf))
            scale = select(kept, weights).astype(wide.dtype)
            return sum_stacked(scale, wide)

        sums = map(sum_examples, leaves, by_leaf, kept_by_leaf(by_leaf, self.mask))
        return jax.tree.unflatten(structure, sums)

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`."""
        return jax.tree.map(lambda leaf: select(self.mask, leaf), self.gradients)

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.gradients
        )


def stacked_grads(
    trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Values, PerExampleGrads]:
    """Returns the values and the stacked gradients of a batch."""

    def of_example(inputs: tuple[PyTree, ...]) -> tuple[tuple[Array, PyTree], list[Array]]:
        (loss, aux), gradients = jax.value_and_grad(trace, has_aux=True)(params, *inputs)
        return (loss, gradients), aux

    # The traced loss runs instead of the user's function, which was called once to trace it.
    if jax.tree.leaves(params) and len(mask) and trace.program.may_spread_nan:
        results = each_example(of_example, inputs, mask)
    else:
        results = jax.vmap(of_example)(inputs)
    (losses, gradients), aux = results
    return Values(losses, aux), StackedGrads(gradients, mask)


def each_example(function: Callable[[Any], PyTree], inputs: Any, mask: Array) -> PyTree:
    """Returns `vmap(function)(inputs)`, with NaN of one example kept away from the others.

    `function` returns `((loss, *rest), aux)`. Where an example has a `loss` or a `rest` that is not
    finite, all floats of its `rest` become NaN.

    `vmap` turns a convolution with one kernel per example, and the gradient of any kernel, into one
    convolution with a group per example. XLA multiplies across the groups by zero, so NaN in one
    example becomes NaN in all. Then the examples are computed one at a time, to find the bad ones,
    and `vmap` runs again with a good example in their place.
    """
    shapes = jax.eval_shape(jax.vmap(function), inputs)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def alone(row: Any) -> tuple[Array, tuple[Array, PyTree]]:
        results = function(row)
        return _all_finite(results[0]), (results[0][0], results[1])

    def without_bad(inputs: Any) -> tuple[Any, Array, Any]:
        finite, values = jax.lax.map(alone, inputs)
        good = finite & mask
        rows = jnp.where(good, jnp.arange(len(mask)), jnp.argmax(good))
        return jax.tree.map(lambda leaf: leaf[rows], inputs), good, values

    def turn(state: Any) -> Any:
        number, _, inputs, good, values, _ = state
        (loss, *rest), aux = jax.vmap(function)(inputs)
        # A padded row may hold anything: it must not cause the slow search.
        ok = _all_finite(jax.tree.map(lambda leaf: select(mask, leaf), (loss, rest)))
        results = (
            (_where(good, loss, values[0]), *jax.tree.map(lambda leaf: _or_nan(good, leaf), rest)),
            jax.tree.map(lambda new, old: _where(good, new, old), aux, values[1]),
        )
        inputs, good, values = jax.lax.cond(
            ok | (number > 0), lambda: (inputs, good, values), lambda: without_bad(inputs)
        )
        return number + 1, ok, inputs, good, values, results

    # A loop compiles `vmap` once, so the same program computes the good examples with and without
    # bad ones. In another program their last digits may differ. Votes depend on these, and so do
    # gradients of a loss with a jump.
    start = (0, jnp.array(False), inputs, jnp.ones_like(mask), (zeros[0][0], zeros[1]), zeros)
    _, ok, *_, results = jax.lax.while_loop(lambda state: ~state[1] & (state[0] < 2), turn, start)
    # An overflow may depend on how an example is computed.
    return jax.lax.cond(ok, lambda: results, lambda: jax.lax.map(function, inputs))


def _all_finite(tree: PyTree) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _where(rows: Array, leaf: Array, other: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, other)


def _or_nan(rows: Array, leaf: Array) -> Array:
    return select(rows, leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def as_per_example_grads(updates: Any, params: Any = None) -> PerExampleGrads:
    """Returns `updates` if it is `PerExampleGrads`, or else wraps a plain tree as `StackedGrads`.

    Args:
        updates: `PerExampleGrads`, or a tree of arrays with a leading example axis.
        params: the parameters, to check the shapes; None to skip the check.

    Returns:
        Per-example gradients.

    Raises:
        TypeError: a leaf does not hold real floating-point numbers.
        ValueError: the leaves have no common leading axis, or do not fit the parameters. A gradient
            that is already summed or averaged cannot be clipped per example.

    Example:
        >>> import jax.numpy as jnp
        >>> as_per_example_grads({"w": jnp.ones((8, 3))}).parameter_specs()
        {'w': ShapeDtypeStruct(shape=(3,), dtype=float32)}
    """
    if isinstance(updates, PerExampleGrads):
        _refuse_changed(updates)
        grads = updates
    else:
        if params is not None:
            _refuse_averaged(updates, params)
        grads = _stack(updates)
    if params is not None:
        _refuse_mismatch(grads.parameter_specs(), params)
    return grads


def _refuse_changed(grads: PerExampleGrads) -> None:
    """Refuses gradients whose leaves went through arithmetic: it turns a mask into numbers."""
    if grads.mask.dtype != bool or grads.mask.ndim != 1:
        raise ValueError(
            "per-example gradients must be passed on as per_example_grads returns them; got a mask "
            f"of {grads.mask.dtype} with shape {grads.mask.shape}, so their leaves were changed. "
            "privatize must come first: compute with what it releases."
        )


def _refuse_averaged(updates: PyTree, params: PyTree) -> None:
    """Refuses gradients with the shapes of the parameters, which have no example axis."""
    leaves, expected = jax.tree.leaves(updates), jax.tree.leaves(params)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (updates, params)]
    same_structure = structures[0] == structures[1]
    if leaves and same_structure and list(map(jnp.shape, leaves)) == list(map(jnp.shape, expected)):
        raise ValueError(
            "expected per-example gradients with a leading axis for the examples, (batch, *shape); "
            "got the shapes of the parameters: these look like gradients that are averaged, "
            "summed, or private already. They cannot be clipped per example. Compute them by "
            "dpoptax.per_example_grads(loss_fn)(params, examples, mask=mask)."
        )


def _stack(gradients: PyTree) -> StackedGrads:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(gradients)}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(
            "expected per-example gradients, in which all leaves have one leading batch axis, "
            "(batch, *shape); got leaves that do not share one. Gradients that are averaged or "
            "summed have no such axis, and cannot be clipped per example. Compute them by "
            "dpoptax.per_example_grads(loss_fn)(params, examples)."
        )
    batch = _validate.leading_axis_size("updates", gradients) if sizes else 0
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
        # nnx.Optimizer takes from the gradients what is an NNX Variable, which is nothing here.
        remedy = "" if jax.tree.leaves(specs) else " With nnx.Optimizer, use dpoptax.nnx.Optimizer."
        raise ValueError(
            "per-example gradients and parameters must have the same tree structure; got "
            f"{structure} and {expected}.{remedy}"
        )
    labelled = jax.tree_util.tree_leaves_with_path(specs)
    for (path, spec), param in zip(labelled, jax.tree.leaves(params), strict=True):
        if spec.shape != jnp.shape(param):
            raise ValueError(
                f"the gradient of params{jax.tree_util.keystr(path)} must have shape (batch, "
                f"*{jnp.shape(param)}); got (batch, *{spec.shape}). A gradient that is summed or "
                "averaged already cannot be clipped per example: use dpoptax.per_example_grads."
            )
