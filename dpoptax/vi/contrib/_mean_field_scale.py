"""The scale that makes the gradients of a mean field's parameters comparable.

The gradients of a mean field's scales are small: latents = loc + T(raw_scale) base_noise moves
little with raw_scale. Clipped and noised together with the gradients of the location, they vanish
in the noise. Scaling them up before the clip gives them less noise.

Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961, section 3.1.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpoptax._pytree import PyTree
from dpoptax.vi.contrib._families import mean_field_of


def mean_field_scale(guide_params: PyTree, guide: Any = None) -> PyTree:
    """Returns the scale before the clip that makes a mean field's gradients comparable.

    Pass it as `dpoptax.transforms.scale_then_privatize(optimizer, scale=mean_field_scale)`, and for
    a NumPyro guide as `scale=lambda params: mean_field_scale(params, guide)`.

    By the chain rule the gradient of raw_scale is the gradient of the latents times
    base_noise * T'(raw_scale), where T' is the logistic function. It is divided by T'(raw_scale).

    Args:
        guide_params: parameters of the guide, on the real line.
        guide: `AutoNormal` or `AutoDiagonalNormal` of NumPyro. None for
            `dpoptax.vi.guides.MeanField`.

    Returns:
        A tree like `guide_params`. Parameters that do not belong to the guide have scale 1.

    Raises:
        TypeError: a guide of another kind.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_field_scale({"loc": jnp.zeros(2), "raw_scale": jnp.zeros(2)})["raw_scale"]
        Array([2., 2.], dtype=float32)

    Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961, section 3.1.
    """
    scale = jax.tree.map(jnp.ones_like, guide_params)
    for _, name in mean_field_of(guide, "mean_field_scale").pairs(guide_params):
        scale[name] = 1 / jax.nn.sigmoid(guide_params[name])
    return scale
