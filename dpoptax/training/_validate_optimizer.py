"""Checks of the optimizer that a caller passes: a transformation that is not private itself."""

from typing import Any

import jax
import optax

from dpoptax._pytree import PyTree
from dpoptax.transforms._privatize import PrivatizeState


def check_transformation(name: str, value: Any) -> None:
    """Raises unless `value` is a transformation of Optax.

    Raises:
        TypeError: it is something else, for example `optax.adam` without a call.
    """
    is_class = isinstance(value, type)
    has_both = all(callable(getattr(value, name, None)) for name in ("init", "update"))
    if has_both and not is_class:
        return
    given = f"an object of type {type(value).__name__}"
    remedy = "Pass for example optax.adam(1e-3)."
    if is_class or callable(value):
        function = getattr(value, "__name__", type(value).__name__)
        given = f"{function}, which is not called"
        remedy = f"Call it, for example {function}(1e-3)."
    raise TypeError(f"{name} must be a transformation of Optax; got {given}. {remedy}")


def check_optimizer(optimizer: Any, params: PyTree) -> None:
    """Raises unless `optimizer` is a transformation without `privatize`.

    Raises:
        TypeError: it is no transformation.
        ValueError: it holds `privatize`, so that gradients would be clipped and noised twice.
    """
    check_transformation("optimizer", optimizer)
    state = _state_of(optimizer, params)
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, PrivatizeState))
    if any(isinstance(leaf, PrivatizeState) for leaf in leaves):
        raise ValueError(
            "optimizer must be a plain transformation of Optax, because the private gradient comes "
            "from the clip and the noise of the plan; got one with privatize, as dp_sgd returns. "
            "Pass for example optax.sgd(0.1) in place of dpoptax.dp_sgd(0.1, ...)."
        )


def _state_of(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    try:
        return jax.eval_shape(optimizer.init, params)
    except jax.errors.ConcretizationTypeError:  # an `init` that looks at values
        return optimizer.init(params)
