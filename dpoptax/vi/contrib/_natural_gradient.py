"""Gradients of a mean field in, better scaled ones out, before the clip or after the noise.

The gradients by the scales are small, since theta = loc + T(raw) eta moves little with raw: clipped
together with those by the location they vanish in the noise. Two remedies: to scale them up before
the clip and down after the noise, and to take natural gradients, scaled by the inverse of the
guide's Fisher information. The second is post-processing.

Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961; Amari 1998 for natural
gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from dpoptax._precision import widen
from dpoptax.per_example import PerExampleGrads, as_per_example_grads
from dpoptax.per_example._base import select
from dpoptax.per_example._stacked import StackedGrads
from dpoptax.vi._kl_after_noise import required


def preconditioned(
    private: optax.GradientTransformation, scale: Callable[[PyTree], PyTree]
) -> optax.GradientTransformation:
    """Scales every coordinate before the clip, and back after the noise.

    The clip bounds the scaled gradient, so the guarantee is that of `private`; coordinates that are
    scaled up get less noise, and the others a tighter clip. It takes the stacked form of the
    gradients.

    Args:
        private: `dpoptax.privatize(...)`.
        scale: `scale(params)`, a tree of positive arrays like the parameters, or that broadcast to
            them, by public numbers alone; `spread` for a mean field.

    Returns:
        An `optax.GradientTransformation` in place of `private`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> private = dpoptax.privatize(1.0, 1.1, expected_batch_size=8, key=jax.random.key(0))
        >>> scale = lambda params: {"w": 1.0, "b": 10.0}
        >>> tx = optax.chain(preconditioned(private, scale), optax.sgd(1.0))
        >>> params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
        >>> grads = {"w": jnp.ones((8, 3)), "b": jnp.ones(8)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> updates["w"].shape
        (3,)

    Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961, section 3.1.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[PyTree, Any]:
        params = required(params)
        factors = scale(params)
        grads: PerExampleGrads = as_per_example_grads(updates, params)

        def scaled(leaf: Array, factor: Any) -> Array:
            return select(grads.mask, widen(leaf) * jnp.asarray(factor, widen(leaf).dtype))

        stacked = jax.tree.map(scaled, grads.stacked(), factors)
        noisy, state = private.update(StackedGrads(stacked, grads.mask), state, params)
        back = jax.tree.map(lambda leaf, f: leaf / jnp.asarray(f, leaf.dtype), noisy, factors)
        return back, state

    return optax.GradientTransformation(private.init, update)


def spread(psi: PyTree) -> PyTree:
    """Returns the scale for `preconditioned` on a mean field: gradients by scales as by locations.

    By the chain rule the gradient by raw is that by theta times eta T'(raw), with T' the logistic
    function; it is divided by T'(raw).

    Args:
        psi: parameters of `dpoptax.vi.guides.MeanField`.

    Returns:
        A tree like `psi`.

    Example:
        >>> import jax.numpy as jnp
        >>> spread({"loc": jnp.zeros(2), "raw_scale": jnp.zeros(2)})["raw_scale"]
        Array([2., 2.], dtype=float32)
    """
    return {
        "loc": jax.tree.map(jnp.ones_like, psi["loc"]),
        "raw_scale": 1 / jax.nn.sigmoid(psi["raw_scale"]),
    }


def natural_gradient() -> optax.GradientTransformation:
    """Turns the gradient of a mean field's parameters into the natural gradient.

    The Fisher information of N(loc, s**2) is 1 / s**2 for loc and 2 T'(raw)**2 / s**2 for raw, with
    s = T(raw). Put it after `elbo.around(...)` and before the optimizer.

    Returns:
        An `optax.GradientTransformation` without state.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = natural_gradient()
        >>> psi = {"loc": jnp.zeros(1), "raw_scale": jnp.zeros(1)}  # the scale is log 2
        >>> gradient = {"loc": jnp.ones(1), "raw_scale": jnp.ones(1)}
        >>> updates, _ = tx.update(gradient, tx.init(psi), psi)
        >>> updates["loc"], updates["raw_scale"]
        (Array([0.480453], dtype=float32), Array([0.960906], dtype=float32))

    Reference: Amari 1998, "Natural gradient works efficiently in learning".
    """

    def update(updates: PyTree, state: Any, params: Any = None) -> tuple[PyTree, Any]:
        params = required(params)
        raw = params["raw_scale"]
        variance = jax.nn.softplus(raw) ** 2
        slope = jax.nn.sigmoid(raw)
        loc, unravel = jax.flatten_util.ravel_pytree(updates["loc"])
        return {
            "loc": unravel(loc * variance),
            "raw_scale": updates["raw_scale"] * variance / (2 * slope**2),
        }, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
