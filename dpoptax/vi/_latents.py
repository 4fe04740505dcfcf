"""The latents of a guide as one flat vector, and the normal distribution that the guide is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi._elbo_terms import GuideModule, Prior

# `draw_latents(key)` returns latents from the prior.
DrawLatents = Callable[[PRNGKeyArray], PyTree]


class GuideNormal(NamedTuple):
    """Mean and covariance of a normal guide, and what makes latents of a flat vector."""

    mean: Float[Array, " latents"]
    covariance: Float[Array, "latents latents"]
    unravel: Callable[[Array], PyTree]


def guide_normal(guide: GuideModule, params: PyTree) -> GuideNormal:
    """Returns the normal distribution of a guide; refuses a guide that is not normal."""
    variables = {"params": params}
    # Only the shape of the noise is used.
    noise, unravel_noise = ravel_pytree(guide.apply(variables, jax.random.key(0), method="noise"))
    _, unravel = ravel_pytree(guide.apply(variables, unravel_noise(noise), method="transform"))

    def transform(flat_noise: Array) -> Array:
        latents = guide.apply(variables, unravel_noise(flat_noise), method="transform")
        found: Array = ravel_pytree(latents)[0]
        return found

    mean = transform(jnp.zeros_like(noise))
    factor = jax.jacobian(transform)(jnp.zeros_like(noise))
    if not isinstance(mean, jax.core.Tracer):
        expected = mean + factor @ noise
        if not np.allclose(transform(noise), expected, rtol=1e-3, atol=1e-4):
            raise ValueError(
                "the latents of this guide are not normal, so their posterior has no normal form. "
                "Use MeanField, LowRank or FullRank for latents on the real line, and map them to "
                "their support inside the log-likelihood and the prior."
            )
    return GuideNormal(mean, factor @ factor.T, unravel)


def initial_params(elbo: Any) -> PyTree:
    """Returns the initial parameters of the guide of an objective."""
    if hasattr(elbo, "init"):
        return elbo.init()
    key = jax.random.key(0)
    return elbo.guide.init(key, key)["params"]


def prior_sampler(elbo: Any, draw_latents: DrawLatents | None) -> DrawLatents:
    """Returns the function that draws latents from the prior of an objective."""
    given = draw_latents or getattr(elbo, "draw_latents", None)
    if given is not None:
        return given
    if callable(elbo.prior):
        raise ValueError(
            "the prior is a log density, from which nothing can be drawn. Pass "
            "draw_latents=..., a function of a key that returns latents from the prior."
        )
    params = initial_params(elbo)
    normal = jax.eval_shape(lambda: guide_mean(elbo.guide, params))
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), normal))
    size = sum(leaf.size for leaf in jax.tree.leaves(normal))
    return lambda key: unravel(elbo.prior * jax.random.normal(key, (size,)))


def guide_mean(guide: GuideModule, params: PyTree) -> PyTree:
    """Returns the latents at which the noise of the guide is zero."""
    noise = guide.apply({"params": params}, jax.random.key(0), method="noise")
    zeros = jax.tree.map(jnp.zeros_like, noise)
    return guide.apply({"params": params}, zeros, method="transform")


def prior_precision(
    prior: Prior, unravel: Callable[[Array], PyTree], at: Float[Array, " latents"]
) -> Float[Array, "latents latents"]:
    """Returns minus the Hessian of the log prior."""
    if not callable(prior):
        return jnp.eye(len(at)) / prior**2
    found: Array = -jax.hessian(lambda flat: prior(unravel(flat)))(at)
    return found
