"""Chain: a private transformation, followed by an optimizer that may read its noise."""

from typing import Any

import jax
import optax

from dpoptax._pytree import PyTree
from dpoptax.transforms._private import PrivateTransformation, bind, stddev_of
from dpoptax.transforms._privatize import PrivatizeState


def chain(
    private: optax.GradientTransformation, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """As `optax.chain(private, optimizer)`, for optimizers that need more than the gradient.

    It tells the optimizer the standard deviation of the noise in each coordinate of the release, as
    the extra argument `noise_stddev`, which `scale_by_adam_bc` reads. It also lets
    `scale_then_privatize` and `disk` act before the clip. `fit` and `PrivateRun` do the same. For
    any other optimizer the steps are those of `optax.chain`.

    Args:
        private: `dpoptax.privatize(...)` or `plan.privatize(key)`; or an objective of
            `dpoptax.vi` wrapped around it.
        optimizer: any transformation of Optax or of this package. Join several by `optax.chain`.

    Returns:
        A transformation of per-example gradients. Its `gradient_point(params, state)` is where the
        gradients of the next step are taken. It is None if that is `params`, as for all optimizers
        but `disk`.

    Raises:
        TypeError: the optimizer acts before the clip, and `private` is not `privatize`.
        ValueError: from `init`, `private` does not hold `privatize`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> from dpoptax.transforms import chain, scale_by_adam_bc
        >>> private = dpoptax.privatize(1.0, 1.1, expected_batch_size=2, key=jax.random.key(0))
        >>> tx = chain(private, optax.chain(scale_by_adam_bc(), optax.scale(-0.01)))
        >>> params = {"w": jnp.zeros(1)}
        >>> updates, _ = tx.update({"w": jnp.array([[1.0], [3.0]])}, tx.init(params), params)
        >>> updates["w"].shape
        (1,)
    """
    private, optimizer = bind(private, optimizer)
    follow = optax.with_extra_args_support(optimizer).update
    moved = getattr(private, "gradient_point", None)

    def init(params: PyTree) -> tuple[Any, Any]:
        state = private.init(params)
        _require_privatize(state)
        return state, optimizer.init(params)

    def update(
        updates: PyTree, state: tuple[Any, Any], params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, tuple[Any, Any]]:
        private_state, optimizer_state = state
        stddev = stddev_of(private, private_state, params)
        if stddev is not None:
            extra_args = {**extra_args, "noise_stddev": stddev}
        released, private_state = private.update(updates, private_state, params)
        updates, optimizer_state = follow(released, optimizer_state, params, **extra_args)
        return updates, (private_state, optimizer_state)

    point = None if moved is None else lambda params, state: moved(params, state[0])
    return PrivateTransformation(init, update, gradient_point=point)


def _require_privatize(state: PyTree) -> None:
    is_private = lambda node: isinstance(node, PrivatizeState)  # noqa: E731
    if not any(map(is_private, jax.tree.leaves(state, is_leaf=is_private))):
        raise ValueError(
            "the first argument of chain must hold privatize, which clips and adds noise; got a "
            "transformation without it. Pass chain(dpoptax.privatize(...), optimizer)."
        )
