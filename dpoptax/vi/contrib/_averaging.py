"""Iterates in, their average out: post-processing that costs no privacy.

Noise moves the parameters about where they would settle; an average over the last of them moves
less (Polyak and Juditsky 1992).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from dpoptax import _validate
from dpoptax.vi._kl_after_noise import required


class AverageState(NamedTuple):
    """How many updates there were, and the average of the parameters since the first counted."""

    step: Int[Array, ""]
    iterate_average: PyTree


def average_iterates(*, start: int = 0) -> optax.GradientTransformation:
    """Keeps the average of the parameters after step `start`; changes no update.

    Put it last in `optax.chain`, where updates are what is added to the parameters.

    Args:
        start: how many updates are left out, while the parameters are still on their way.

    Returns:
        An `optax.GradientTransformation`; `averaged(opt_state)` reads it.

    Raises:
        TypeError: a start that is not whole.
        ValueError: a start below 0.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.sgd(1.0), average_iterates(start=1))
        >>> params, state = jnp.array(0.0), tx.init(jnp.array(0.0))
        >>> for gradient in (-8.0, -1.0, -1.0):  # the parameters become 8, 9 and 10
        ...     updates, state = tx.update(jnp.array(gradient), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> float(averaged(state))
        9.5

    Reference: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """
    first = _validate.count("start", start, at_least=0)

    def init(params: PyTree) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), params)

    def update(
        updates: PyTree, state: AverageState, params: Any = None
    ) -> tuple[PyTree, AverageState]:
        params = required(params)
        count = jnp.maximum(state.step - first + 1, 1)

        def mean(average: Array, parameter: Array, change: Array) -> Array:
            now = (parameter + change).astype(average.dtype)
            return average + (now - average) / count.astype(average.dtype)

        average = jax.tree.map(mean, state.iterate_average, params, updates)
        return updates, AverageState(state.step + 1, average)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any) -> PyTree:
    """Returns the average that `average_iterates` has kept.

    Args:
        opt_state: the state of a chain that it is part of; of `fit`, `result.state.opt_state`.

    Returns:
        A tree like the parameters.

    Raises:
        KeyError: it is no part of the chain.

    Example:
        >>> import jax.numpy as jnp
        >>> averaged(average_iterates().init(jnp.array(3.0)))
        Array(3., dtype=float32, weak_type=True)
    """
    found = optax.tree_utils.tree_get(opt_state, "iterate_average")
    if found is None:
        raise KeyError("no part of this state is of average_iterates.")
    return found
