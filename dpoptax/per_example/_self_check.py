"""A loss, two examples in; a refusal if the factored form disagrees with `vmap(grad)` on them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from dpoptax import _validate
from dpoptax.per_example._factored import factored_grads
from dpoptax.per_example._stacked import stacked_grads
from dpoptax.per_example._tracing.interpreter import evaluate


def check_factored(
    loss_fn: Callable[..., Array], params: PyTree, inputs: tuple[PyTree, ...]
) -> None:
    """Compares norms and sums of both forms on the first two examples, at once.

    Under `jit` there are no values yet: stand-ins of the same shapes take their place, normal
    numbers for floats and zeros for integers.

    Args:
        loss_fn: the scalar loss of one example, `loss_fn(params, *input)`.
        params: the parameters.
        inputs: the examples, and their keys where the loss draws, with a leading axis.

    Raises:
        RuntimeError: the forms disagree by more than rounding.
    """
    two = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf])[:2], inputs)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), two)
    closed = jax.make_jaxpr(loss_fn)(params, *one)
    values = (closed.consts, params, two)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)):
        with jax.ensure_compile_time_eval():
            values = _stand_ins(values)
    with jax.ensure_compile_time_eval():
        _compare(closed.jaxpr, *values)


def _compare(jaxpr: Any, constants: list[Any], params: PyTree, inputs: tuple[PyTree, ...]) -> None:
    def loss_fn(params: PyTree, *inputs: PyTree) -> Array:
        return evaluate(jaxpr, constants, jax.tree.leaves((params, inputs)))

    def norms_and_sum(form_of: Callable[..., Any]) -> tuple[PyTree, PyTree]:
        def run(params: PyTree, inputs: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
            _, grads = form_of(loss_fn, params, inputs, jnp.ones((2,), bool))
            norms = jax.tree.map(jnp.sqrt, grads.squared_norms())
            return norms, grads.weighted_sum(jnp.array([0.25, 1.0]))

        return jax.jit(run)(params, inputs)

    results = norms_and_sum(factored_grads), norms_and_sum(stacked_grads)
    for number, what in enumerate(("norms", "sum")):
        pairs = zip(*(jax.tree.leaves_with_path(result[number]) for result in results), strict=True)
        for ((path, got), (_, expected)), leaf in zip(pairs, jax.tree.leaves(params), strict=True):
            narrow = jnp.finfo(jnp.result_type(leaf)).bits < 32
            size = np.linalg.norm(np.asarray(expected, np.float64))
            error = np.linalg.norm(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
            # A loss that is not finite on these examples cannot be judged.
            if np.isfinite(size) and not error <= (0.1 if narrow else 1e-3) * size + 1e-6:
                raise RuntimeError(
                    f"the factored {what} of params{jax.tree_util.keystr(path)} differ from those "
                    f"of vmap(grad) on two examples, by {error:.3g} of {size:.3g}. Pass "
                    "factored=False, and please report the loss: this is a fault of dpoptax."
                )


def _stand_ins(values: PyTree) -> PyTree:
    def stand_in(number: int, leaf: Any) -> Array:
        key, dtype = jax.random.key(number), jnp.result_type(leaf)
        if _validate.is_key(leaf):
            return jax.random.split(key, leaf.shape)
        if jnp.issubdtype(dtype, jnp.floating):
            return jax.random.normal(key, jnp.shape(leaf), dtype)
        return jnp.zeros(jnp.shape(leaf), dtype)

    leaves, treedef = jax.tree.flatten(values)
    return jax.tree.unflatten(treedef, [stand_in(i, leaf) for i, leaf in enumerate(leaves)])
