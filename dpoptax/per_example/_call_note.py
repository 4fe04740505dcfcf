"""What a loss was called with, for the errors that it raises. Shapes only, never values."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dpoptax import _validate
from dpoptax._pytree import PyTree

_MAX_LEAVES = 6
# Parts of a name that say that an argument is a PRNG key.
_KEY_NAMES = ("key", "rng", "seed", "rand")
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


def refuse_no_function(loss_fn: Any, name: str = "loss_fn") -> None:
    """Raises for anything but a function, without showing its value."""
    if callable(loss_fn):
        return
    remedy = "Pass a function of (params, example)."
    if isinstance(loss_fn, tuple) and loss_fn and callable(loss_fn[0]):
        remedy = (
            "dpoptax.nnx.loss_fn returns a pair: write loss, params = dpoptax.nnx.loss_fn(...), "
            "and pass both."
        )
    raise TypeError(f"{name} must be a function; got {_validate.described(loss_fn)}. {remedy}")


def not_a_key(
    loss_fn: Callable[..., Any], error: Exception, name: str = "loss_fn", first: str = "params"
) -> TypeError | None:
    """Returns an error for a loss that failed with a key as its third argument, such as `y`.

    None if the name of the argument says that it is a key: the loss then failed for another reason.
    """
    names = list(inspect.signature(loss_fn).parameters)
    if len(names) < 3:
        return None
    third = names[2]
    is_short = len(third) == 1 and third not in "xyt"
    if is_short or any(part in third.lower() for part in _KEY_NAMES):
        return None
    return TypeError(
        f"{name} is called with ({first}, example, key): the third argument of a loss is a PRNG "
        f"key. Got a loss whose third argument is {third}, which failed with a key "
        f"({type(error).__name__}). If inputs and labels are two arguments, pass "
        f"{_UNPACK.replace('params', first)}, and (inputs, labels) as one example. If {third} is "
        "meant to be the key, the error above says what failed."
    )


def refuse_signature(
    loss_fn: Callable[..., Any], params: PyTree, example: PyTree, keys: Sequence[Any]
) -> None:
    """Raises if a loss does not take these arguments."""
    refuse_no_function(loss_fn)
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
