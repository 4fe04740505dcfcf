"""Adapter from optimizers of NumPyro to Optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from numpyro.optim import Minimize

from dpoptax._pytree import PyTree


def as_optax(optim: Any) -> optax.GradientTransformation:
    """Returns an optimizer of NumPyro, whose state holds the parameters, as one of Optax."""
    if isinstance(optim, optax.GradientTransformation):
        return optim
    if not all(hasattr(optim, name) for name in ("init", "update", "get_params")):
        raise TypeError(
            f"optim must be an optimizer of numpyro.optim or Optax; got {type(optim).__name__}."
        )

    if isinstance(optim, Minimize):
        raise TypeError(
            "optim is numpyro.optim.Minimize, which evaluates the loss on all data many times per "
            "step. A private step releases one gradient: use numpyro.optim.Adam or another one."
        )

    def update(updates: PyTree, state: Any, params: Any = None) -> tuple[PyTree, Any]:
        del params
        # Optax returns the change of the parameters; NumPyro returns the parameters.
        before = optim.get_params(state)
        state = optim.update(updates, state)
        return jax.tree.map(jnp.subtract, optim.get_params(state), before), state

    return optax.GradientTransformation(optim.init, update)
