"""Draws from a posterior that is nearly normal, by importance sampling.

The scale of a hierarchical model has a skewed posterior, which no normal distribution describes.
Draws come from a multivariate t distribution with the mean and covariance of the closest normal
one. Their importance weights correct what is left, and systematic resampling makes the weights
equal.

Reference: Gelman et al., "Bayesian Data Analysis", 3rd edition, section 10.4.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi._antithetic import antithetic_normal
from dpoptax.vi._likelihood_of_releases import NormalLikelihood
from dpoptax.vi._normal_posterior import Normal

_NUM_DRAWS = 4096
# Tails that are heavier than those of the posterior keep the weights bounded.
_DEGREES_OF_FREEDOM = 8.0
# With fewer effective draws the quantiles would be noise, and the normal distribution is better.
_LEAST_EFFECTIVE = 100.0


def weighted_draws(
    likelihood: NormalLikelihood,
    log_prior: Callable[[PyTree], Float[Array, ""]],
    unravel: Callable[[Array], PyTree],
    closest: Normal,
    key: PRNGKeyArray,
) -> Float[Array, "draws latents"]:
    """Returns draws from likelihood times prior.

    If the weights are too uneven, the draws are those of the closest normal distribution.
    """
    normal_key, scale_key, resample_key = jax.random.split(key, 3)
    size = len(closest.mean)
    factor = jnp.linalg.cholesky(closest.covariance)
    normal = antithetic_normal(normal_key, _NUM_DRAWS, size)
    chi_squared = 2 * jax.random.gamma(scale_key, _DEGREES_OF_FREEDOM / 2, (_NUM_DRAWS,))
    standard = normal * jnp.sqrt(_DEGREES_OF_FREEDOM / chi_squared)[:, None]
    proposed = closest.mean + standard @ factor.T

    def log_posterior(flat: Array) -> Array:
        quadratic = flat @ likelihood.shift - flat @ likelihood.precision @ flat / 2
        return log_prior(unravel(flat)) + quadratic

    squared = jnp.sum(standard**2, axis=1) / _DEGREES_OF_FREEDOM
    log_proposal = -(_DEGREES_OF_FREEDOM + size) / 2 * jnp.log1p(squared)
    log_weights = jax.vmap(log_posterior)(proposed) - log_proposal
    # A density that overflows far away has no weight, as where it is zero.
    weights = jax.nn.softmax(jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights))
    effective = 1 / jnp.sum(weights**2)
    steps = (
        jnp.arange(_NUM_DRAWS, dtype=jnp.float32) + jax.random.uniform(resample_key)
    ) / _NUM_DRAWS
    chosen = jnp.searchsorted(jnp.cumsum(weights), steps)
    resampled = proposed[jnp.minimum(chosen, _NUM_DRAWS - 1)]
    # NaN, if no draw has weight, is not above the limit.
    return jnp.where(effective > _LEAST_EFFECTIVE, resampled, closest.mean + normal @ factor.T)
