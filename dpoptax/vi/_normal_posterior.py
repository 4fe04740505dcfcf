"""Posterior of a normal likelihood under a prior, as the closest normal distribution.

For a normal prior the posterior is exact. For a log density it is Gaussian variational inference
without data: with q = N(mean, covariance), the optimum has

    covariance^-1 = precision - E_q[Hessian of log prior],   E_q[gradient of log posterior] = 0

and a damped fixed-point iteration with fixed draws finds it.

Reference: Opper and Archambeau 2009, "The variational Gaussian approximation revisited".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax.vi._antithetic import antithetic_normal
from dpoptax.vi._elbo_terms import Prior
from dpoptax.vi._likelihood_of_releases import NormalLikelihood

_NUM_DRAWS = 64
_NUM_ITERATIONS = 100
_DAMPING = 0.2
# Limits of one iteration, far from the optimum: of a step in standard deviations, and of the ratio
# by which a precision grows.
_LONGEST_STEP = 3.0
_LARGEST_RATIO = 10.0
# The centre has settled after a move of fewer posterior standard deviations.
_LARGEST_MOVE = 0.1
_MOST_MOVES = 20


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
    normal = antithetic_normal(key, _NUM_DRAWS, len(start))

    def improve(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        mean, precision = state
        lower = jnp.linalg.cholesky(precision)
        # The explicit inverse, because XLA's batched triangular solve with a transposed matrix is
        # hundreds of times slower on CPU.
        inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(mean)), lower=True)
        # Draws mean + L^-T normal have covariance (L L^T)^-1.
        draws = mean + normal @ inverse
        hessian = jax.vmap(jax.hessian(log_prior))(draws).mean(0)
        gradient = jax.vmap(jax.grad(log_prior))(draws).mean(0)
        gradient += likelihood.shift - likelihood.precision @ mean
        return (
            mean + _damped_step(inverse, gradient),
            _damped_precision(lower, inverse, likelihood.precision - hessian),
        )

    first = likelihood.precision + jnp.eye(len(start))
    mean, precision = jax.lax.fori_loop(0, _NUM_ITERATIONS, improve, (start, first))
    return Normal(mean, jnp.linalg.inv(precision))


def fixed_point(fit_at: Callable[[Normal], Normal], start: Normal) -> Normal:
    """Returns the posterior whose mean hardly moves if it is fitted again at itself."""

    def improve(state: tuple[Normal, Array, Array]) -> tuple[Normal, Array, Array]:
        at, _, count = state
        found = fit_at(at)
        stddevs = jnp.abs(found.mean - at.mean) / jnp.sqrt(jnp.diag(found.covariance))
        return found, stddevs.max(), count + 1

    def moves(state: tuple[Normal, Array, Array]) -> Array:
        return (state[1] > _LARGEST_MOVE) & (state[2] < _MOST_MOVES)

    first = (start, jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(moves, improve, first)[0]


def _damped_step(inverse: Array, gradient: Array) -> Array:
    """Returns a part of the Newton step, of limited length in standard deviations."""
    scaled = inverse @ gradient
    scaled = scaled * _DAMPING / jnp.maximum(1, jnp.linalg.norm(scaled) / _LONGEST_STEP)
    return inverse.T @ scaled


def _damped_precision(lower: Array, inverse: Array, target: Array) -> Array:
    """Moves the precision towards a target that may not be positive; the result always is."""
    relative = inverse @ target @ inverse.T
    values, vectors = jnp.linalg.eigh((relative + relative.T) / 2)
    values = 1 - _DAMPING + _DAMPING * jnp.clip(values, 0, _LARGEST_RATIO)
    root = lower @ vectors
    return (root * values) @ root.T
