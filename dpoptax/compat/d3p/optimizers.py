"""ADADP, an optimizer whose learning rate adapts to the noisy gradients.

It only sees gradients that are private already, so it costs no privacy. Each of its two half steps
takes one update, which is charged as usual.

Reference: Koskela and Honkela 2020, arXiv:1809.03832.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax import _validate
from dpoptax._pytree import PyTree

__all__ = ["ADADP", "adadp"]


def __dir__() -> list[str]:
    return __all__


class _AdadpState(NamedTuple):
    """The parameters now and at the start of the pair of steps, and after one whole step."""

    params: PyTree
    learning_rate: Float[Array, ""]
    whole_step: PyTree
    previous: PyTree


class _Triple(NamedTuple):
    """An optimizer as JAX's example libraries have them."""

    init_fn: Callable[[PyTree], _AdadpState]
    update_fn: Callable[[Any, PyTree, _AdadpState], _AdadpState]
    params_fn: Callable[[_AdadpState], PyTree]


def adadp(
    step_size: float = 1e-3,
    tol: float = 1.0,
    stability_check: bool = True,
    alpha_min: float = 0.9,
    alpha_max: float = 1.1,
) -> Any:
    """Returns ADADP as three functions.

    Updates come in pairs. Two half steps are compared with one whole step from the same gradient;
    the error of step i is |whole_i - halves_i| / max(1, |whole_i|), and its norm e scales the
    learning rate by sqrt(tol / e), between `alpha_min` and `alpha_max`.

    Args:
        step_size: the first learning rate.
        tol: the error that is aimed at.
        stability_check: whether a pair of updates with a larger error is undone.
        alpha_min: the smallest factor of the learning rate per pair; d3p has 0.9 in any case.
        alpha_max: the largest one; d3p has 1.1 in any case.

    Returns:
        `(init, update, get_params)` with `init(params)`, `update(i, gradient, state)` and
        `get_params(state)`.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> init, update, get_params = adadp(0.1)
        >>> state = init(4.0)
        >>> for i in range(100):
        ...     state = update(i, 2 * get_params(state), state)
        >>> abs(float(get_params(state))) < 0.1
        True
    """
    for name, value in (("step_size", step_size), ("tol", tol), ("alpha_min", alpha_min)):
        _validate.positive(name, value)
    if _validate.real("alpha_max", alpha_max) < alpha_min:
        raise ValueError(
            f"alpha_max is at least alpha_min, {alpha_min}; got {alpha_max}. Exchange them."
        )

    def init(params: PyTree) -> _AdadpState:
        params = jax.tree.map(jnp.asarray, params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return _AdadpState(params, jnp.asarray(step_size, jnp.float32), zeros, params)

    def update(i: Any, gradient: PyTree, state: _AdadpState) -> _AdadpState:
        def moved(rate: Array) -> PyTree:
            return jax.tree.map(lambda x, g: (x - rate * g).astype(x.dtype), state.params, gradient)

        halves = moved(0.5 * state.learning_rate)
        first = _AdadpState(halves, state.learning_rate, moved(state.learning_rate), state.params)
        error = _error(state.whole_step, halves)
        # An error of 0 divides to infinity, which the limit turns into alpha_max.
        factor = jnp.clip(jnp.sqrt(tol / error), alpha_min, alpha_max)
        undone = (error > tol) & stability_check
        params = jax.tree.map(lambda old, new: jnp.where(undone, old, new), state.previous, halves)
        second = state._replace(params=params, learning_rate=state.learning_rate * factor)
        is_first = jnp.asarray(i) % 2 == 0
        return jax.tree.map(lambda a, b: jnp.where(is_first, a, b), first, second)

    return _Triple(init, update, lambda state: state.params)


class ADADP:
    """`adadp` as an optimizer for `DPSVI`, with the arguments of `adadp`.

    Example:
        >>> optimizer = ADADP(0.1)
        >>> state = optimizer.init({"x": 4.0})
        >>> for _ in range(100):
        ...     state = optimizer.update({"x": 2 * optimizer.get_params(state)["x"]}, state)
        >>> abs(float(optimizer.get_params(state)["x"])) < 0.1
        True
    """

    def __init__(
        self,
        step_size: float = 1e-3,
        tol: float = 1.0,
        stability_check: bool = True,
        alpha_min: float = 0.9,
        alpha_max: float = 1.1,
    ) -> None:
        self._functions = adadp(step_size, tol, stability_check, alpha_min, alpha_max)

    def init(self, params: PyTree) -> tuple[Array, Any]:
        """Returns the state before the first update: its number, and that of `adadp`."""
        return jnp.zeros((), jnp.int32), self._functions.init_fn(params)

    def update(self, g: PyTree, state: tuple[Array, Any], value: Any = None) -> tuple[Array, Any]:
        """Returns the state after one update with a noisy gradient; `value` is not used."""
        del value
        step, inner = state
        return step + 1, self._functions.update_fn(step, g, inner)

    def get_params(self, state: tuple[Array, Any]) -> PyTree:
        """Returns the parameters."""
        return self._functions.params_fn(state[1])


def _error(whole: PyTree, halves: PyTree) -> Float[Array, ""]:
    squares = jax.tree.map(
        lambda w, h: jnp.sum(jnp.square((w - h) / jnp.maximum(1.0, jnp.abs(w))), dtype=jnp.float32),
        whole,
        halves,
    )
    return jnp.sqrt(jnp.sum(jnp.stack(jax.tree.leaves(squares))))
