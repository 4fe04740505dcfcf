"""What a loss was called with, for the errors that it raises. Shapes only, never values."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

_MAX_LEAVES = 6
_UNPACK = "lambda params, example: loss(params, *example)"


def call_note(example: PyTree, keys: Sequence[Any]) -> str:
    """The note that is added to an error from inside a loss."""
    called = "and one PRNG key" if keys else "and no PRNG key"
    third = "The third argument is the key. " if keys else ""
    return (
        f"dpoptax called loss_fn with params, one example and no batch axis ({describe(example)}), "
        f"{called}. Write the loss of one example; dpoptax adds the batch axis. If the model needs "
        f"a batch axis, add one of size one inside the loss: x[None]. {third}If your loss takes "
        f"inputs and labels as two arguments, pass {_UNPACK}."
    )


def describe(example: PyTree) -> str:
    """The leaves of one example: name, dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(example)
    listed = [
        f"example{jax.tree_util.keystr(path)}: {leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in leaves[:_MAX_LEAVES]
    ]
    if len(leaves) > _MAX_LEAVES:
        listed.append(f"and {len(leaves) - _MAX_LEAVES} more")
    return ", ".join(listed)


def refuse_signature(
    loss_fn: Callable[..., Any], params: PyTree, example: PyTree, keys: Sequence[Any]
) -> None:
    """Raises if a loss does not take these arguments."""
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):
        return  # some callables written in C have no signature
    try:
        signature.bind(params, example, *keys)
    except TypeError as error:
        expected = "(params, example, key)" if keys else "(params, example)"
        if keys:
            advice = "Leave out key=, or give loss_fn a third argument, key."
        else:
            advice = (
                "If the third argument is a key, pass key= with the examples. If inputs and labels "
                f"are two arguments, pass {_UNPACK}, and (inputs, labels) as examples."
            )
        raise TypeError(
            f"loss_fn is called with {expected}: {describe(example)}. Got one that takes "
            f"{_names(signature)} ({error}). {advice}"
        ) from None


def _names(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"
