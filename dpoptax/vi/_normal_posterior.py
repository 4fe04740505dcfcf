"""Posterior of a normal likelihood under a prior, as the closest normal distribution.

For a normal prior the posterior is exact. For a log density it is Gaussian variational inference
without data: with q = N(mean, covariance), the optimum has

    covariance^-1 = precision - E_q[Hessian of log prior],   E_q[gradient of log posterior] = 0

and a damped fixed-point iteration with fixed draws finds it.

Reference: Opper and Archambeau 2009, "The variational Gaussian approximation revisited".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax.vi._elbo_terms import Prior
from dpoptax.vi._likelihood_of_releases import NormalLikelihood

_NUM_DRAWS = 64
_NUM_ITERATIONS = 100
_DAMPING = 0.2
# The precision of any direction is at least this, also where a prior is nearly flat.
_LEAST_PRECISION = 1e-3


class Normal(NamedTuple):
    """A normal distribution over the flat latents."""

    mean: Float[Array, " latents"]
    covariance: Float[Array, "latents latents"]


def normal_posterior(
    likelihood: NormalLikelihood,
    prior: Prior,
    unravel: Callable[[Array], object],
    start: Float[Array, " latents"],
    key: PRNGKeyArray,
) -> Normal:
    """Returns the normal distribution closest to likelihood times prior."""
    if not callable(prior):
        precision = likelihood.precision + jnp.eye(len(start)) / prior**2
        covariance = jnp.linalg.inv(precision)
        return Normal(covariance @ likelihood.shift, covariance)
    log_prior = lambda flat: prior(unravel(flat))  # noqa: E731
    half = jax.random.normal(key, (_NUM_DRAWS // 2, len(start)))
    normal = jnp.concatenate([half, -half])

    def improve(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        mean, precision = state
        factor = jnp.linalg.cholesky(jnp.linalg.inv(precision))
        draws = mean + normal @ factor.T
        hessian = jax.vmap(jax.hessian(log_prior))(draws).mean(0)
        gradient = jax.vmap(jax.grad(log_prior))(draws).mean(0)
        gradient += likelihood.shift - likelihood.precision @ mean
        target = likelihood.precision - hessian
        precision = _positive((1 - _DAMPING) * precision + _DAMPING * target)
        step = jnp.linalg.solve(precision, gradient)
        return mean + _DAMPING * step, precision

    first = likelihood.precision + jnp.eye(len(start))
    mean, precision = jax.lax.fori_loop(0, _NUM_ITERATIONS, improve, (start, first))
    return Normal(mean, jnp.linalg.inv(precision))


def _positive(matrix: Array) -> Array:
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * jnp.maximum(values, _LEAST_PRECISION)) @ vectors.T
