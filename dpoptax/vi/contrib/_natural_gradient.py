"""Natural gradient of a mean field: the gradient times the inverse Fisher information.

The Fisher information of N(loc, s**2) with s = T(raw_scale) is 1 / s**2 for loc and
2 T'(raw_scale)**2 / s**2 for raw_scale. It depends on the guide's parameters alone, so the natural
gradient is post-processing of the private gradient.

Reference: Amari 1998, "Natural gradient works efficiently in learning"; Jälkö, Prediger, Honkela
and Kaski 2022, arXiv:2210.15961.
"""

from typing import Any

import jax
import jax.flatten_util
import optax

from dpoptax._pytree import PyTree
from dpoptax.transforms._private import require_params
from dpoptax.vi.contrib._families import mean_field_of


def natural_gradient(guide: Any = None) -> optax.GradientTransformation:
    """Turns the gradient of a mean field's parameters into the natural gradient.

    Put it after `elbo.wrap(...)` and before the optimizer. With `DPSVI` or `fit` write
    `optax.chain(natural_gradient(guide), optax.sgd(0.1))`.

    Args:
        guide: `AutoNormal` or `AutoDiagonalNormal` of NumPyro. None for
            `dpoptax.vi.guides.MeanField`.

    Returns:
        An `optax.GradientTransformation` without state. Gradients of parameters that do not belong
        to the guide stay as they are.

    Raises:
        TypeError: a guide of another kind.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = natural_gradient()
        >>> guide_params = {"loc": jnp.zeros(1), "raw_scale": jnp.zeros(1)}  # the scale is log 2
        >>> gradient = {"loc": jnp.ones(1), "raw_scale": jnp.ones(1)}
        >>> updates, _ = tx.update(gradient, tx.init(guide_params), guide_params)
        >>> updates["loc"], updates["raw_scale"]
        (Array([0.480453], dtype=float32), Array([0.960906], dtype=float32))

    Reference: Amari 1998, "Natural gradient works efficiently in learning".
    """
    family = mean_field_of(guide, "natural_gradient")

    def update(updates: PyTree, state: Any, params: Any = None) -> tuple[PyTree, Any]:
        params, natural = require_params(params), dict(updates)
        for loc_name, scale_name in family.pairs(params):
            raw_scale = params[scale_name]
            variance = jax.nn.softplus(raw_scale) ** 2
            slope = jax.nn.sigmoid(raw_scale)
            # The location of our own guide is a tree, and its scales are one vector.
            loc, unravel = jax.flatten_util.ravel_pytree(updates[loc_name])
            natural[loc_name] = unravel(loc * variance.reshape(-1))
            natural[scale_name] = updates[scale_name] * variance / (2 * slope**2)
        return natural, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
