"""Averages of the parameters over the steps of a run.

The noise of private gradients keeps the parameters moving around the optimum. Their average moves
less. It is post-processing and costs no privacy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dpoptax import _validate
from dpoptax._precision import widen
from dpoptax._pytree import PyTree
from dpoptax.transforms._private import checked_decay, one_minus_power, require_params


class AverageState(NamedTuple):
    """The number of updates so far, and the average of the parameters, in float32 or wider."""

    step: Int[Array, ""]
    iterate_average: PyTree


def average_params(*, decay: float | None = None, start: int = 0) -> optax.GradientTransformation:
    """Keeps an average of the parameters; changes no update.

    Put it last in `optax.chain`: it expects updates that are added to the parameters as they are.
    With n the number of steps after `start`, x the parameters after a step, and d the decay,

        average = average + w_n (x - average),   w_n = 1 / n,   or (1 - d) / (1 - d**n)

    The first is the mean of all parameters after `start` (Polyak averaging of the tail). The second
    is an exponential average that is corrected for its start, so it needs no warm-up. Up to `start`
    the average is the latest parameters.

    Args:
        decay: of an exponential average, in [0, 1): it reaches back about 1 / (1 - decay) steps.
            None for the mean of the tail.
        start: number of first steps to leave out, until the parameters have settled. For the mean
            of the second half of a run pass `plan.num_steps // 2`.

    Returns:
        An `optax.GradientTransformation`. After `fit` read the average by `result.averaged_params`,
        and in your own loop by `averaged_params(opt_state)`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.sgd(1.0), average_params(start=1))
        >>> params, state = jnp.array(0.0), tx.init(jnp.array(0.0))
        >>> for gradient in (-8.0, -1.0, -1.0):  # the parameters become 8, 9 and 10
        ...     updates, state = tx.update(jnp.array(gradient), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> float(averaged_params(state))
        9.5

    Reference: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging";
    for private training De et al. 2022, arXiv:2204.13650, section 3.
    """
    first = _validate.count("start", start, at_least=0)
    rate = None if decay is None else checked_decay("decay", decay)

    def init(params: PyTree) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(widen, params))

    def update(
        updates: PyTree, state: AverageState, params: Any = None
    ) -> tuple[PyTree, AverageState]:
        params = require_params(params)
        # Until `start` the count stays 1, so that the average is the latest parameters.
        count = jnp.maximum(state.step - first + 1, 1).astype(jnp.float32)
        weight = 1 / count if rate is None else (1 - rate) / one_minus_power(rate, count)

        def moved(average: Array, parameter: Array, change: Array) -> Array:
            now = widen((parameter + change).astype(parameter.dtype))
            return average + weight.astype(average.dtype) * (now - average)

        average = jax.tree.map(moved, state.iterate_average, params, updates)
        return updates, AverageState(state.step + 1, average)

    return optax.GradientTransformation(init, update)


def averaged_params(opt_state: Any) -> PyTree:
    """Returns the average of the parameters that `average_params` keeps.

    Args:
        opt_state: the state of a chain with `average_params`.

    Returns:
        A tree like the parameters, in float32 or wider.

    Raises:
        KeyError: the chain has no `average_params`.

    Example:
        >>> import jax.numpy as jnp
        >>> float(averaged_params(average_params().init(jnp.array(3.0))))
        3.0
    """
    average = _find(opt_state)
    if average is None:
        raise KeyError(
            "this optimizer state holds no average. Add average_params() at the end of optax.chain."
        )
    return average


def average_like(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """Returns the average with the dtypes of the parameters; None if the state holds none."""
    average = _find(opt_state)
    if average is None:
        return None
    return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), average, params)


def _find(opt_state: optax.OptState) -> PyTree:
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "iterate_average")
    return found[0][1] if found else None
