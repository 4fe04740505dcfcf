"""The scale that makes the gradients of a mean field's parameters comparable.

The gradients of a mean field's scales are small: latents = loc + T(raw_scale) base_noise moves
little with raw_scale. Clipped and noised together with the gradients of the location, they vanish
in the noise. Scaling them up before the clip gives them less noise.

Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961, section 3.1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def mean_field_scale(guide_params: PyTree) -> PyTree:
    """Returns the scale before the clip that makes a mean field's gradients comparable.

    Pass it as `dpoptax.transforms.scale_then_privatize(optimizer, scale=mean_field_scale)`.

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
