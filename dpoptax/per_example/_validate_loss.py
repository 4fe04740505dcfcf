"""Checks of parameters, batch and loss, before anything private is computed."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dpoptax import _validate
from dpoptax._masked_examples import MaskedExamples
from dpoptax._pytree import PyTree
from dpoptax.per_example import _model_checks as models
from dpoptax.per_example._call_note import (
    call_note,
    not_a_key,
    refuse_no_function,
    refuse_signature,
)
from dpoptax.per_example._loss_trace import LossTrace, is_pair, trace_loss

# How many parameters an error lists by name.
_MAX_NAMES = 5


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
    if isinstance(mask, MaskedExamples):
        raise TypeError(
            f"{name} must be a boolean array; got MaskedExamples, which samplers.take returns. "
            "Pass all of it as the examples, without a mask: it holds the mask too."
        )
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
    models.refuse_state(params)
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=models.is_variable):
        for leaf in jax.tree.leaves(node):
            dtype = jnp.result_type(leaf)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"params{jax.tree_util.keystr(path)} must be a real floating-point array, or "
                    f"it has no gradient; got {dtype}. Keep such values outside params, as "
                    "constants of the loss."
                )


def check_loss(
    loss_fn: Callable[..., Any],
    params: PyTree,
    examples: PyTree,
    key: Any,
    *,
    has_aux: bool | None = False,
    allow_unused: bool = False,
) -> LossTrace:
    """Traces the loss of one example; raises if it is not one real number, or not pure.

    With `has_aux` the loss returns a pair `(loss, aux)`; None accepts both. Without `allow_unused`
    every parameter must have an influence on the loss.
    """
    example = jax.tree.map(_spec_of_row, examples)
    keys = () if key is None else (_validate.typed_key("key", key),)
    refuse_signature(loss_fn, params, example, keys)
    try:
        trace, output, effects = trace_loss(loss_fn, params, (example, *keys), has_aux)
    except Exception as error:
        if (refusal := models.state_error(error)) is not None:
            raise refusal from error
        found = not_a_key(loss_fn, error) if keys else None
        # An adapter calls the loss of another library in another way, and says how.
        note_of = getattr(loss_fn, "call_note", call_note)
        (found or error).add_note(note_of(example, keys))
        if found is not None:
            raise found from error
        raise
    # JAX marks jax.debug.print and jax.debug.callback as debug effects.
    if others := sorted(str(effect) for effect in effects if "Debug" not in str(effect)):
        raise ValueError(
            "loss_fn must be pure: it is traced, and its equations may run in another order. Got "
            f"the side effect(s) {', '.join(others)}. Compute such values in a separate function; "
            "jax.debug.print may stay."
        )
    _check_output(output, has_aux)
    models.check_layers(trace.program.jaxpr, trace.program.num_constants)
    if not allow_unused:
        _refuse_unused(trace)
    return trace


def _check_output(output: Any, has_aux: bool | None) -> None:
    """Raises unless a loss returned one real scalar, or a pair of it and anything else."""
    if is_pair(output) and has_aux is not False:
        output = output[0]
    elif has_aux:
        raise ValueError(
            "with has_aux, loss_fn must return a pair (loss, aux); got "
            f"{_describe_output(output)}. Return both, or leave out has_aux."
        )
    if output is None:
        raise ValueError(
            "loss_fn must return one scalar, the loss of one example; got None. Add the missing "
            "return statement."
        )
    if not isinstance(getattr(output, "shape", None), tuple):
        raise ValueError(
            "loss_fn must return one scalar, the loss of one example; got "
            f"{_describe_output(output)}. Return only the loss. If the rest are metrics, use "
            "value_and_per_example_grads(loss_fn, has_aux=True), or fit(..., diagnostics=True). If "
            f"the rest is updated state: {models.NO_STATE[0].lower()}{models.NO_STATE[1:]}."
        )
    if output.shape != ():
        raise ValueError(
            f"loss_fn must return a scalar, the loss of one example; got shape {output.shape}. "
            "Sum or average over the axes within the example. The batch axis is not one of them: "
            "dpoptax adds it."
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise TypeError(
            f"loss_fn must return a real floating-point loss; got {output.dtype}. Convert the "
            "inputs to float32 before you compute the loss."
        )


def _describe_output(output: Any) -> str:
    """The structure of what a loss returned, without values."""
    return str(jax.tree.structure(output))


def _refuse_unused(trace: LossTrace) -> None:
    """Raises if the gradient of a parameter is zero for every example, whatever the values."""
    unused = trace.program.unused_params
    if not unused:
        return
    names = ", ".join(f"params{name}" for name in unused[:_MAX_NAMES])
    if len(unused) > _MAX_NAMES:
        names += f" and {len(unused) - _MAX_NAMES} more"
    raise ValueError(
        f"every leaf of params must have an influence on the loss; got {names} without one: "
        "unused, behind stop_gradient, or converted to integers. The gradient is zero, so training "
        "would only add noise to it. Pass the trainable part of the tree as params, and close over "
        "the frozen part: lambda trainable, example: loss_fn({**frozen, **trainable}, example). "
        "For an NNX model, choose the trainable part by dpoptax.nnx.loss_fn(model, loss, wrt=...). "
        "If another part of the objective trains the leaf, pass allow_unused=True to "
        "per_example_grads."
    )


def takes_key(function: Callable[..., Any], name: str = "loss_fn", first: str = "params") -> bool:
    """Whether a loss takes `(params, example, key)`, not just `(params, example)`."""
    refuse_no_function(function, name)
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
            f"requires {required} argument{'' if required == 1 else 's'}. Write it with these "
            "arguments only: bind others with functools.partial, and take inputs and labels as one "
            "example, (inputs, labels)."
        )
    return required == 3


def _spec_of_row(leaf: Any) -> jax.ShapeDtypeStruct:
    # NumPy's int64 becomes JAX's int32, unless 64 bits are enabled. Keys have a dtype of their own.
    dtype = leaf.dtype if _validate.is_key(leaf) else jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape[1:], dtype)
