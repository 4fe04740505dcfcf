"""DiSK: a simplified Kalman filter of the released gradients.

The filter carries an estimate of the gradient from step to step. It predicts how the gradient
changes as the parameters move, by taking it a little ahead of them, and corrects the prediction by
each release.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dpoptax import _validate
from dpoptax._precision import wide_dtype, widen
from dpoptax._pytree import PyTree
from dpoptax.transforms._private import (
    PrivateOptimizer,
    PrivateTransformation,
    require_params,
)


class DiskState(NamedTuple):
    """The state of `privatize`, the number of updates, the last parameters and the estimate."""

    inner: Any
    step: Int[Array, ""]
    previous_params: PyTree
    gradient_estimate: PyTree


def disk(
    optimizer: optax.GradientTransformation, *, gain: float = 0.7
) -> optax.GradientTransformationExtraArgs:
    """Denoises released gradients by a Kalman filter with a constant gain.

    With x_t the parameters and k the gain, the gradients of a batch are taken at an extrapolated
    point, are made private there, and enter the estimate that the optimizer gets:

        point_t = x_t + (1 - k) / k * (x_t - x_{t-1})
        e_t = (1 - k) e_{t-1} + k * privatize(gradients at point_t),   e_1 the first release

    This is the paper's algorithm with its gamma set to (1 - k) / k. Then it needs one gradient per
    example and step. Another gamma needs two, at point_t and at x_t, whose weighted sum is clipped
    as one vector. That is not offered here.

    The point is public, and one example's contribution is clipped as always, so sensitivity and
    epsilon are those of `privatize`. It costs the memory of two copies of the parameters. With a
    gain of 1 nothing is filtered.

    In `fit` and `PrivateRun` it is an optimizer like others. In a loop of your own, take the
    gradients where the transformation says:

        tx = dpoptax.transforms.chain(dpoptax.privatize(...), disk(optax.sgd(0.1)))
        grads = per_example_grads(loss)(tx.gradient_point(params, state), examples)
        updates, state = tx.update(grads, state, params)

    Args:
        optimizer: gets the estimate of the gradient.
        gain: the weight of a new release, above 0 and at most 1. The smaller, the less noise, and
            the further ahead the gradients are taken. The paper uses 0.7.

    Returns:
        An optimizer for `fit`, `PrivateRun` or `dpoptax.transforms.chain`.

    Raises:
        TypeError: `gain` is not a number.
        ValueError: `gain` is out of range. From `update`: it is inside another transformation.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 20),
        ...     clip=1.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> result = dpoptax.training.fit(
        ...     lambda mean, x: 0.5 * (mean - x) ** 2, jnp.array(0.0), jnp.ones(200), plan=plan,
        ...     optimizer=disk(optax.sgd(0.1)), key=jax.random.key(0), progress=False,
        ... )
        >>> abs(float(result.params) - 1) < 0.3
        True

    Reference: Zhang, Bu, Balle, Hong, Razaviyayn and Mirrokni 2024, arXiv:2410.03883, algorithm 1.
    """
    gain = _validate.real("gain", gain)
    if not 0 < gain <= 1:
        raise ValueError(f"gain must be above 0 and at most 1; got {gain}. Pass for example 0.7.")
    ahead = (1 - gain) / gain

    def gradient_point(params: PyTree, state: DiskState) -> PyTree:
        def extrapolated(now: Array, before: Array) -> Array:
            return (widen(now) + ahead * (widen(now) - widen(before))).astype(now.dtype)

        return jax.tree.map(extrapolated, params, state.previous_params)

    def wrap(private: PrivateTransformation) -> PrivateTransformation:
        def init(params: PyTree) -> DiskState:
            estimate = jax.tree.map(
                lambda leaf: jnp.zeros_like(leaf, wide_dtype(leaf.dtype)), params
            )
            return DiskState(private.init(params), jnp.zeros((), jnp.int32), params, estimate)

        def update(
            updates: Any, state: DiskState, params: Any = None, **extra_args: Any
        ) -> tuple[PyTree, DiskState]:
            del extra_args
            params = require_params(params)
            noisy, inner = private.update(updates, state.inner, params)
            weight = jnp.where(state.step == 0, 1.0, gain)
            estimate = jax.tree.map(
                lambda e, g: e + weight.astype(e.dtype) * (widen(g) - e),
                *(state.gradient_estimate, noisy),
            )
            filtered = jax.tree.map(lambda e, g: e.astype(g.dtype), estimate, noisy)
            return filtered, DiskState(inner, state.step + 1, params, estimate)

        return PrivateTransformation(init, update, gradient_point=gradient_point)

    return PrivateOptimizer("disk", optimizer, wrap)
