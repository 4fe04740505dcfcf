"""Checks of parameters, batch and loss, before anything private is computed."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from dpoptax import _validate
from dpoptax.per_example._loss_trace import LossTrace, trace_loss

_NO_STATE = (
    "Per-example gradients need a model without mutable state: batch statistics mix examples, "
    "and updating them from data is not private. Use a normalization within the example "
    "(GroupNorm, LayerNorm) instead of BatchNorm, and differentiate only the trainable parameters"
)


def batch_mask(examples: PyTree, mask: Any, *carried: Any) -> Bool[Array, " batch"]:
    """Returns which rows of a batch count: those where `mask` and all carried masks are True."""
    batch = _validate.leading_axis_size("examples", examples)
    rows = jnp.ones((batch,), bool)
    if mask is not None:
        rows &= _check_mask("mask", mask, batch, "Pass mask.astype(bool), one entry for each row.")
    for part in carried:
        # Such as `jax.tree.map` over `MaskedExamples`, which also maps the mask.
        remedy = "Change the examples alone: MaskedExamples(change(taken.examples), taken.mask)."
        rows &= _check_mask("the mask of the examples", part, batch, remedy)
    return rows


def _check_mask(name: str, mask: Any, batch: int, remedy: str) -> Bool[Array, " batch"]:
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"{name} must be boolean, True for a real example; got {mask.dtype}. {remedy}"
        )
    if mask.shape != (batch,):
        raise ValueError(
            f"{name} must have shape ({batch},), one entry per example; got {mask.shape}. {remedy}"
        )
    return mask


def check_params(params: PyTree) -> None:
    """Raises for mutable state among the parameters, and for leaves without a derivative."""
    if isinstance(params, Mapping) and "params" in params and len(params) > 1:
        others = ", ".join(repr(name) for name in params if name != "params")
        raise ValueError(
            f"params holds the collection(s) {others} in addition to 'params'. {_NO_STATE}: "
            "pass variables['params'], and keep the rest as constants of the loss."
        )
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable):
        label = f"params{jax.tree_util.keystr(path)}"
        if _is_variable(node) and not isinstance(node, sys.modules["flax.nnx"].Param):
            raise ValueError(
                f"{label} is a {type(node).__name__}, not a parameter. {_NO_STATE}: "
                "graphdef, params, rest = nnx.split(model, nnx.Param, ...)."
            )
        for leaf in jax.tree.leaves(node):
            dtype = jnp.result_type(leaf)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"{label} must be a real floating-point array, or it has no gradient; got "
                    f"{dtype}. Keep such values outside params, as constants of the loss."
                )


def _is_variable(node: Any) -> bool:
    # Flax takes long to import. Who has not imported it has no variables of it.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def check_loss(
    loss_fn: Callable[..., Any], params: PyTree, examples: PyTree, key: Any
) -> LossTrace:
    """Traces the loss of one example; raises if it is not one real number, or not pure."""
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), examples)
    keys = () if key is None else (_validate.typed_key("key", key),)
    try:
        trace, loss, effects = trace_loss(loss_fn, params, (example, *keys))
    except Exception as error:
        if not _is_state_error(error):
            raise
        raise ValueError(
            f"loss_fn changes the state of a Flax module while it runs. {_NO_STATE}."
        ) from error
    # JAX marks jax.debug.print and jax.debug.callback as debug effects.
    if others := sorted(str(effect) for effect in effects if "Debug" not in str(effect)):
        raise ValueError(
            "loss_fn must be pure: it is traced, and its equations may run in another order. Got "
            f"the side effect(s) {', '.join(others)}. Compute such values in a separate function; "
            "jax.debug.print may stay."
        )
    if not isinstance(getattr(loss, "shape", None), tuple):
        raise ValueError(
            "loss_fn must return one scalar, the loss of one example; got "
            f"{jax.tree.structure(loss)}. Return only the loss. If the rest is updated state: "
            f"{_NO_STATE[0].lower()}{_NO_STATE[1:]}."
        )
    if loss.shape != ():
        raise ValueError(
            f"loss_fn must return a scalar, the loss of one example; got shape {loss.shape}. "
            "Sum or average over the axes within the example; dpoptax adds the batch axis."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"loss_fn must return a real floating-point loss; got {loss.dtype}.")
    return trace


def takes_key(function: Callable[..., Any], name: str = "loss_fn", first: str = "params") -> bool:
    """Whether a loss takes `(params, example, key)`, not just `(params, example)`."""
    positional = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = sum(parameter.default is parameter.empty for parameter in positional)
    if required == 2 and [parameter.name for parameter in positional[2:3]] == ["key"]:
        raise TypeError(
            f"{name} has a default for its third argument, key, so it is unclear whether to pass "
            "one. Remove the default, or bind it with functools.partial."
        )
    if required not in (2, 3):
        raise TypeError(
            f"{name} must take ({first}, example) or ({first}, example, key); got one that "
            f"requires {required} arguments. Bind the others with functools.partial."
        )
    return required == 3


def _is_state_error(error: Exception) -> bool:
    """Whether Flax raised because a module changed its state under a trace."""
    errors = sys.modules.get("flax.errors")
    return errors is not None and isinstance(
        error, (errors.ModifyScopeVariableError, errors.TraceContextError)
    )
