"""A compiled Keras model as a pure loss of parameters, one example and a key."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree

_SEED_SHAPE = (2,)


def parameters(model: Any) -> tuple[dict[str, Array], list[str]]:
    """Returns the trainable values by path, and the paths in the order of Keras."""
    params: dict[str, Array] = {}
    for variable in model.trainable_variables:
        name, number = variable.path, 2
        while name in params:  # two layers may have one name
            name, number = f"{variable.path} ({number})", number + 1
        params[name] = jnp.copy(variable.value)
    return params, list(params)


def loss_of(model: Any, names: list[str]) -> Callable[..., Float[Array, ""]]:
    """Returns the compiled loss of one example `(x, y)`; with a key if the model draws numbers."""
    fixed = list(model.non_trainable_variables)
    # Keras donates the arrays of its variables when it evaluates, so these are copies.
    values = [jnp.copy(variable.value) for variable in fixed]
    kept = {id(variable) for variable in model.non_trainable_weights}
    seeds = [
        number
        for number, variable in enumerate(fixed)
        if id(variable) not in kept and _is_seed(variable)
    ]
    metrics = [jnp.copy(variable.value) for variable in model.metrics_variables]

    def run(params: dict[str, Array], example: PyTree, key: Any) -> Float[Array, ""]:
        state = list(values)
        for number in seeds:
            # Each generator of random numbers starts from a key of its own, for each example.
            own = jax.random.fold_in(key, number)
            state[number] = jax.random.bits(own, _SEED_SHAPE, jnp.uint32)
        x, y = jax.tree.map(lambda leaf: leaf[None], example)
        _, (loss, _, after, _) = model.compute_loss_and_updates(
            [params[name] for name in names],
            state,
            metrics,
            x,
            y,
            None,
            training=True,
            optimizer_variables=[],
        )
        for variable, old, new in zip(fixed, state, after, strict=True):
            if id(variable) in kept and new is not old:
                _refuse_state(variable)
        return loss

    # `takes_key` reads these signatures.
    def with_key(params: dict[str, Array], example: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        return run(params, example, key)

    def without_key(params: dict[str, Array], example: PyTree) -> Float[Array, ""]:
        return run(params, example, None)

    return with_key if seeds else without_key


def _is_seed(variable: Any) -> bool:
    """Whether a variable is the state of a `keras.random.SeedGenerator`."""
    return tuple(variable.shape) == _SEED_SHAPE and str(variable.dtype) == "uint32"


def _refuse_state(variable: Any) -> None:
    raise ValueError(
        f"expected a model without mutable state; got one that changes {variable.path} in training."
        " Statistics of a batch, as in BatchNormalization, mix examples, and they are not private. "
        "Use LayerNormalization or GroupNormalization, or freeze the layer by layer.trainable = "
        "False: it then uses its statistics as they are, which must come from public data."
    )
