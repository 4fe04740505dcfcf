"""Polyak averaging: the mean of the last parameters of a run.

The noise of private gradients keeps the parameters moving around the optimum. Their average over
the last steps moves less. It is post-processing and costs no privacy.

Reference: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from dpoptax import _validate
from dpoptax.vi._kl_after_noise import require_params


class AverageState(NamedTuple):
    """The number of updates so far, and the average of the parameters since `start`."""

    step: Int[Array, ""]
    iterate_average: PyTree


def average_iterates(*, start: int = 0) -> optax.GradientTransformation:
    """Keeps the average of the parameters after step `start`; changes no update.

    Put it last in `optax.chain`: it expects updates that are added to the parameters as they are.

    Args:
        start: number of first updates to leave out, until the parameters have settled.

    Returns:
        An `optax.GradientTransformation`; read the average by `polyak_average(opt_state)`.

    Raises:
        TypeError: a start that is not a whole number.
        ValueError: a start below 0.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.sgd(1.0), average_iterates(start=1))
        >>> params, state = jnp.array(0.0), tx.init(jnp.array(0.0))
        >>> for gradient in (-8.0, -1.0, -1.0):  # the parameters become 8, 9 and 10
        ...     updates, state = tx.update(jnp.array(gradient), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> float(polyak_average(state))
        9.5

    Reference: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """
    first = _validate.count("start", start, at_least=0)

    def init(params: PyTree) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), params)

    def update(
        updates: PyTree, state: AverageState, params: Any = None
    ) -> tuple[PyTree, AverageState]:
        params = require_params(params)
        # Until `start` the count stays 1, so that the average is the latest parameters.
        count = jnp.maximum(state.step - first + 1, 1)

        def running_mean(average: Array, parameter: Array, change: Array) -> Array:
            now = (parameter + change).astype(average.dtype)
            return average + (now - average) / count.astype(average.dtype)

        average = jax.tree.map(running_mean, state.iterate_average, params, updates)
        return updates, AverageState(state.step + 1, average)

    return optax.GradientTransformation(init, update)


def polyak_average(opt_state: Any) -> PyTree:
    """Returns the average of the parameters that `average_iterates` keeps.

    Args:
        opt_state: the state of a chain with `average_iterates`; after `fit`,
            `result.state.opt_state`.

    Returns:
        A tree like the parameters.

    Raises:
        KeyError: the chain has no `average_iterates`.

    Example:
        >>> import jax.numpy as jnp
        >>> polyak_average(average_iterates().init(jnp.array(3.0)))
        Array(3., dtype=float32, weak_type=True)
    """
    average = optax.tree_utils.tree_get(opt_state, "iterate_average")
    if average is None:
        raise KeyError(
            "this optimizer state holds no average. Add average_iterates() at the end of "
            "optax.chain."
        )
    return average
