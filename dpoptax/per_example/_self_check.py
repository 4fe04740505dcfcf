"""Self-check: compares a form of gradients with `vmap(grad)` on two examples."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.per_example._deferred import FormOf
from dpoptax.per_example._loss_trace import LossTrace
from dpoptax.per_example._stacked import stacked_grads


def check_form(
    form_of: FormOf, trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...]
) -> None:
    """Raises RuntimeError if norms or sums of the first two examples differ by more than rounding.

    Warns if a gradient is not finite there.

    It runs at once, also under `jit`. There are no values under `jit`, so made-up values of the
    same shapes replace them: normal numbers for floats and zeros for integers.
    """
    # A batch of one gives the same example twice.
    two = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf])[:2], inputs)
    values, where = (trace, params, two), "the first two examples; this warning is not private"
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)):
        with jax.ensure_compile_time_eval():
            values, where = _made_up(values), "made-up parameters and examples"
    with jax.ensure_compile_time_eval():
        _compare(form_of, *values, where)


def _compare(
    checked: FormOf, trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], where: str
) -> None:
    def norms_and_sum(form_of: Callable[..., Any]) -> tuple[PyTree, PyTree]:
        def run(
            trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...]
        ) -> tuple[PyTree, PyTree]:
            _, grads = form_of(trace, params, inputs, jnp.ones((2,), bool))
            norms = jax.tree.map(jnp.sqrt, grads.squared_norms())
            return norms, grads.weighted_sum(jnp.array([0.25, 1.0]))

        return jax.jit(run)(trace, params, inputs)

    results = norms_and_sum(checked), norms_and_sum(stacked_grads)
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(results[1][0])):
        warnings.warn(
            f"the gradient of the loss is not finite on {where}. Expected a finite one: an "
            "example without it contributes nothing. Look for token ids out of range, missing "
            "values, and logarithms or divisions at zero.",
            UserWarning,
            stacklevel=2,
        )
    for number, what in enumerate(("norms", "sum")):
        pairs = zip(*(jax.tree.leaves_with_path(result[number]) for result in results), strict=True)
        for ((path, got), (_, expected)), leaf in zip(pairs, jax.tree.leaves(params), strict=True):
            narrow = jnp.finfo(jnp.result_type(leaf)).bits < 32
            size = np.linalg.norm(np.asarray(expected, np.float64))
            error = np.linalg.norm(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
            # The tolerances are for rounding: a wrong rule is off by far more. Nothing can be said
            # of a loss that is not finite on these examples.
            if np.isfinite(size) and not error <= (0.1 if narrow else 1e-3) * size + 1e-6:
                raise RuntimeError(
                    f"the {what} of params{jax.tree_util.keystr(path)} differ from those "
                    f"of vmap(grad) on two examples, by {error:.3g} of {size:.3g}. Pass "
                    "form='stacked', and please report the loss: this is a bug in dpoptax."
                )


def _made_up(values: PyTree) -> PyTree:
    def made_up(number: int, leaf: Any) -> Array:
        key, dtype = jax.random.key(number), jnp.result_type(leaf)
        if _validate.is_key(leaf):
            return jax.random.split(key, leaf.shape)
        if jnp.issubdtype(dtype, jnp.floating):
            return jax.random.normal(key, jnp.shape(leaf), dtype)
        return jnp.zeros(jnp.shape(leaf), dtype)

    leaves, treedef = jax.tree.flatten(values)
    return jax.tree.unflatten(treedef, [made_up(i, leaf) for i, leaf in enumerate(leaves)])
