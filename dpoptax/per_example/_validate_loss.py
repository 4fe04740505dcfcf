"""What a user passed in; nothing out but refusals, before anything private is computed."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, PyTree

from dpoptax import _validate

_NO_STATE = (
    "Per-example gradients need a model without mutable state: batch statistics mix examples, "
    "and updating them from data is not private. Use a normalisation within the example "
    "(GroupNorm, LayerNorm) instead of BatchNorm, and differentiate the trainable parameters only"
)


def batch_mask(examples: PyTree, mask: Any) -> Bool[Array, " batch"]:
    """Returns the mask of a batch, all True where none was given."""
    batch = _validate.batch_size("examples", examples)
    if mask is None:
        return jnp.ones((batch,), bool)
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be boolean, True for a real example; got {mask.dtype}. "
            "Pass mask.astype(bool)."
        )
    if mask.shape != (batch,):
        raise ValueError(
            f"mask must have shape ({batch},), one entry per example; got {mask.shape}."
        )
    return mask


def check_params(params: PyTree) -> None:
    """Refuses mutable state among the parameters, and leaves that cannot be differentiated."""
    if isinstance(params, Mapping) and "params" in params and len(params) > 1:
        others = ", ".join(repr(name) for name in params if name != "params")
        raise ValueError(
            f"params holds the collection(s) {others} beside 'params'. {_NO_STATE}: "
            "pass variables['params'], and the rest as constants of the loss."
        )
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable):
        label = f"params{jax.tree_util.keystr(path)}"
        if _is_variable(node) and not isinstance(node, nnx.Param):
            raise ValueError(
                f"{label} is a {type(node).__name__}, not a parameter. {_NO_STATE}: "
                "graphdef, params, rest = nnx.split(model, nnx.Param, ...)."
            )
        for leaf in jax.tree.leaves(node):
            dtype = jnp.result_type(leaf)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"{label} must be a real floating-point array to be differentiated; got "
                    f"{dtype}. Keep such values outside params, as constants of the loss."
                )


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def check_loss(loss_fn: Callable[..., Any], params: PyTree, examples: PyTree, key: Any) -> None:
    """Refuses a loss of one example that is not one real number; traces it, computes nothing."""
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), examples)
    extra = () if key is None else (_validate.typed_key("key", key),)
    try:
        closed, loss = jax.make_jaxpr(loss_fn, return_shape=True)(params, example, *extra)
    except (flax.errors.ModifyScopeVariableError, flax.errors.TraceContextError) as error:
        raise ValueError(
            f"loss_fn changes the state of a Flax module while it runs. {_NO_STATE}."
        ) from error
    if effects := sorted(str(effect) for effect in closed.effects if "Debug" not in str(effect)):
        raise ValueError(
            "loss_fn must be pure, for it is traced and run in an order of its own; got the side "
            f"effect(s) {', '.join(effects)}. Return what you want to know from a loss of its own; "
            "jax.debug.print may stay."
        )
    if not isinstance(getattr(loss, "shape", None), tuple):
        raise ValueError(
            "loss_fn must return one scalar, the loss of one example; got "
            f"{jax.tree.structure(loss)}. Return the loss alone; if the rest is updated state: "
            f"{_NO_STATE[0].lower()}{_NO_STATE[1:]}."
        )
    if loss.shape != ():
        raise ValueError(
            f"loss_fn must return a scalar, the loss of one example; got shape {loss.shape}. "
            "Sum or average over the axes within the example; the batch axis is added for you."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"loss_fn must return a real floating-point loss; got {loss.dtype}.")


def takes_key(function: Callable[..., Any], name: str = "loss_fn", first: str = "params") -> bool:
    """Whether a loss is `(params, example, key)` rather than `(params, example)`.

    Raises:
        TypeError: it is neither.
    """
    positional = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = sum(parameter.default is parameter.empty for parameter in positional)
    if required == 2 and [parameter.name for parameter in positional[2:3]] == ["key"]:
        raise TypeError(
            f"{name} has a default for its third argument, key, so that nobody can tell whether it "
            "is to be given one. Take the default away, or bind it with functools.partial."
        )
    if required not in (2, 3):
        raise TypeError(
            f"{name} must take ({first}, example) or ({first}, example, key); got one that "
            f"requires {required} arguments. Bind the others with functools.partial."
        )
    return required == 3
