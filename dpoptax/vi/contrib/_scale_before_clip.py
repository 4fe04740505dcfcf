"""Preconditioning of private gradients: scales coordinates before the clip, and back afterwards.

The gradients of a mean field's scales are small: latents = loc + T(raw_scale) base_noise moves
little with raw_scale. Clipped and noised together with the gradients of the location, they vanish
in the noise. Scaling them up before the clip gives them less noise.

Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961, section 3.1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from dpoptax._precision import widen
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._base import select
from dpoptax.per_example._stacked import StackedGrads, as_per_example_grads
from dpoptax.vi._kl_after_noise import require_params


def scale_before_clip(
    private: optax.GradientTransformation, scale: Callable[[PyTree], PyTree]
) -> optax.GradientTransformation:
    """Scales every coordinate before the clip, and back after the noise.

    The clip bounds the scaled gradient, so the guarantee is that of `private`. Coordinates that are
    scaled up get less noise; the others get a tighter clip. The per-example gradients are
    materialized, which takes memory for `batch * parameters` numbers.

    Args:
        private: `dpoptax.privatize(...)`.
        scale: `scale(params)`, a tree of positive arrays like the parameters, or arrays that
            broadcast to them. It must depend on public values only. For a mean field pass
            `mean_field_scale`.

    Returns:
        An `optax.GradientTransformation` to use in place of `private`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> private = dpoptax.privatize(1.0, 1.1, expected_batch_size=8, key=jax.random.key(0))
        >>> scale = lambda params: {"w": 1.0, "b": 10.0}
        >>> tx = optax.chain(scale_before_clip(private, scale), optax.sgd(1.0))
        >>> params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
        >>> grads = {"w": jnp.ones((8, 3)), "b": jnp.ones(8)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> updates["w"].shape
        (3,)

    Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961, section 3.1.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[PyTree, Any]:
        params = require_params(params)
        factors = scale(params)
        grads: PerExampleGrads = as_per_example_grads(updates, params)

        def scaled(leaf: Array, factor: Any) -> Array:
            # Select after scaling, so that padded rows are zero whatever they hold.
            return select(grads.mask, widen(leaf) * jnp.asarray(factor, widen(leaf).dtype))

        stacked = jax.tree.map(scaled, grads.stacked(), factors)
        noisy, state = private.update(StackedGrads(stacked, grads.mask), state, params)
        unscaled = jax.tree.map(lambda leaf, f: leaf / jnp.asarray(f, leaf.dtype), noisy, factors)
        return unscaled, state

    return optax.GradientTransformation(private.init, update)


def mean_field_scale(guide_params: PyTree) -> PyTree:
    """Returns the scale for `scale_before_clip` that makes a mean field's gradients comparable.

    By the chain rule the gradient of raw_scale is the gradient of the latents times
    base_noise * T'(raw_scale), where T' is the logistic function. It is divided by T'(raw_scale).

    Args:
        guide_params: parameters of `dpoptax.vi.guides.MeanField`.

    Returns:
        A tree like `guide_params`.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_field_scale({"loc": jnp.zeros(2), "raw_scale": jnp.zeros(2)})["raw_scale"]
        Array([2., 2.], dtype=float32)
    """
    return {
        "loc": jax.tree.map(jnp.ones_like, guide_params["loc"]),
        "raw_scale": 1 / jax.nn.sigmoid(guide_params["raw_scale"]),
    }
