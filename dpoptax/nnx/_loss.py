"""An NNX model as a pure loss: parameters come in, and each example draws its own numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.per_example._call_note import not_a_key
from dpoptax.per_example._model_checks import remedy
from dpoptax.per_example._validate_loss import takes_key

# `loss(model, example)` or `loss(model, example, key)`.
ModelLoss = Callable[..., Any]


def loss_fn(
    model: nnx.Module, loss: ModelLoss, *, wrt: Any = nnx.Param
) -> tuple[Callable[..., Any], nnx.State[Any, Any]]:
    """Returns a pure loss for `per_example_grads` or `fit`, and the parameters to train.

    The random streams of the model, such as those of `nnx.Dropout`, are seeded with the key of
    each example. So each example has its own mask at each step. All other state is fixed.

    Args:
        model: the model. It is not changed: afterwards write `nnx.update(model, params)`.
        loss: `loss(model, example)`, or `loss(model, example, key)` if it needs a key itself: the
            scalar loss of one example, without a batch axis.
        wrt: which Variables to train, as in `nnx.grad`: `nnx.Param` or a subclass such as
            `nnx.LoRAParam`. The others stay as they are.

    Returns:
        `(loss_fn, params)`. `loss_fn` takes `(params, example)`. It takes `(params, example, key)`
        if the model has random streams or the loss takes a key. `params` is an `nnx.State`.

    Raises:
        TypeError: the model is no `nnx.Module`, or `loss` has another signature.
        ValueError: no Variable matches `wrt`. From `loss_fn`: the model changes a Variable while it
            runs, as `nnx.BatchNorm` does in training.

    Example:
        >>> import dpoptax, jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Sequential(
        ...     nnx.Linear(3, 1, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        ... )
        >>> loss, params = loss_fn(model, lambda model, x: jnp.sum(model(x) ** 2))
        >>> grads = dpoptax.per_example_grads(loss)(params, jnp.ones((4, 3)), key=jax.random.key(0))
        >>> grads.global_squared_norms().shape
        (4,)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module; got {type(model).__name__}. Pass the model itself, not "
            "its graph definition or its state."
        )
    loss_takes_key = takes_key(loss, "loss", "model")
    graph, *states = nnx.split(model, wrt, nnx.RngState, ...)
    # Variables of its own: those of the split are the model's, and change with it.
    params, streams, rest = (jax.tree.map(lambda leaf: leaf, state) for state in states)
    if not jax.tree.leaves(params):
        raise ValueError(
            f"wrt={wrt!r} must match Variables of the model; got none. Pass nnx.Param, or the type "
            "of the Variables that you want to train."
        )

    def run(params: nnx.State, example: PyTree, key: Any) -> Float[Array, ""]:
        # Without a copy NNX refuses to count up a stream inside a transformation.
        copy = nnx.merge(graph, params, _restart(streams, key), rest, copy=True)
        before = _variables(copy)
        keys = (jax.random.fold_in(key, 0),) if loss_takes_key else ()
        try:
            value = loss(copy, example, *keys)
        except Exception as error:
            if keys and (found := not_a_key(loss, error, "loss", "model")) is not None:
                raise found from error
            raise
        _refuse_changes(before, _variables(copy))
        return value

    # `takes_key` reads these signatures.
    def with_key(params: nnx.State, example: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        return run(params, example, key)

    def without_key(params: nnx.State, example: PyTree) -> Float[Array, ""]:
        return run(params, example, None)

    needs_key = loss_takes_key or bool(jax.tree.leaves(streams))
    return (with_key if needs_key else without_key), params


def _restart(streams: nnx.State, key: Any) -> nnx.State:
    """Returns random streams that start from `key`, each from another key."""
    leaves, treedef = jax.tree.flatten(streams)

    def restart(number: int, leaf: Array) -> Array:
        if not _validate.is_key(leaf):
            return jnp.zeros_like(leaf)  # a count
        # Number 0 is the key of the loss. A stream may hold an array of keys.
        own = jax.random.fold_in(key, number + 1)
        return own if leaf.shape == () else jax.random.split(own, leaf.shape)

    return jax.tree.unflatten(treedef, [restart(i, leaf) for i, leaf in enumerate(leaves)])


def _variables(model: nnx.Module) -> dict[tuple[Any, ...], tuple[nnx.Variable[Any], Any]]:
    """The Variables of a model, and the arrays in them now, by path."""
    return {
        path: (node, node.get_value())
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState)
    }


def _refuse_changes(before: dict[Any, Any], after: dict[Any, Any]) -> None:
    for path, (variable, value) in before.items():
        if path in after and after[path][1] is not value:
            name = ".".join(map(str, path))
            raise ValueError(
                f"loss changes the state of the model while it runs: {name}, of type "
                f"{type(variable).__name__}. {remedy(variable)}"
            )
