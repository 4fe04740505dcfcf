"""Draws from the posterior of a linear regression given noisy moments, in units of the bounds.

The state of the chains is the Cholesky factor of the moments with the logarithms of its diagonal.
It is unconstrained, and nearly normal where the noise is small.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpoptax.vi.conjugate import _noisy_posterior
from dpoptax.vi.conjugate._moments import (
    Factor,
    log_evidence,
    log_features_prior,
    multiply,
)


def upper(matrices: Float[Array, "*batch n n"]) -> Float[Array, "*batch entries"]:
    rows, columns = np.triu_indices(matrices.shape[-1])
    factors = np.where(rows == columns, 1.0, math.sqrt(2)).astype(np.float32)
    return matrices[..., rows, columns] * factors


def matrix(entries: Float[Array, " entries"], size: int) -> Float[Array, "n n"]:
    """The symmetric matrix of `upper`."""
    rows, columns = np.triu_indices(size)
    factors = np.where(rows == columns, 1.0, math.sqrt(0.5)).astype(np.float32)
    upper = jnp.zeros((size, size)).at[rows, columns].set(entries * factors)
    return jnp.where(np.tri(size, k=-1, dtype=bool), upper.T, upper)


def _factor_of(point: Float[Array, " dim"], num_examples: Array) -> Factor:
    """The factor L from the logarithms of its diagonal and what lies below."""
    size = _size(len(point))
    lower = jnp.diag(jnp.exp(point[:size])).at[np.tril_indices(size, k=-1)].set(point[size:])
    return Factor(lower[:-1, :-1], lower[-1, :-1], point[size - 1], num_examples)


def _moments(point: Float[Array, " dim"], num_examples: Array) -> Float[Array, " dim"]:
    """The entries of M as they are released."""
    factor = _factor_of(point, num_examples)
    top = jnp.concatenate([factor.second_moments, factor.cross_moments[:, None]], axis=1)
    last = jnp.append(factor.cross_moments, factor.squares)
    return upper(jnp.concatenate([top, last[None]]))


def _log_density(point: Float[Array, " dim"], noisy: _noisy_posterior.Noisy) -> Float[Array, ""]:
    size = _size(len(point))
    factor = _factor_of(point, noisy.num_examples)
    off = (noisy.values - _moments(point, noisy.num_examples)) / noisy.noise_stddev
    # The last term is the Jacobian of M as a function of the point.
    powers = np.arange(size + 1, 1, -1, dtype=np.float32)
    return (
        -jnp.sum(off**2) / 2
        + log_evidence(factor, noisy.prior)
        + log_features_prior(factor, noisy.prior)
        + jnp.sum(powers * point[:size])
    )


@jax.jit
def _start(noisy: _noisy_posterior.Noisy) -> tuple[Float[Array, " dim"], Float[Array, "dim dim"]]:
    """A point near the noisy moments, and the root of its covariance by the noise alone."""
    size = _size(len(noisy.values))
    values, vectors = jnp.linalg.eigh(matrix(noisy.values, size))
    # The noise may have made the matrix indefinite.
    smallest = noisy.noise_stddev + 1e-6 * noisy.num_examples
    values = jnp.maximum(values, smallest) / noisy.num_examples
    lower = jnp.linalg.cholesky(multiply(vectors * values, vectors.T))
    point = jnp.append(jnp.log(jnp.diagonal(lower)), lower[np.tril_indices(size, k=-1)])
    slope = jax.jacfwd(_moments)(point, noisy.num_examples) / noisy.noise_stddev
    information = multiply(slope.T, slope)
    information += 1e-4 * jnp.diag(jnp.diagonal(information)) + jnp.eye(len(point))
    root = jnp.linalg.inv(jnp.linalg.cholesky(information)).T
    return point, root


def _size(num_entries: int) -> int:
    """The side of a symmetric matrix with this many entries in its upper triangle."""
    return (math.isqrt(8 * num_entries + 1) - 1) // 2


draw = functools.partial(
    _noisy_posterior.draw, _noisy_posterior.Statistics(_log_density, _start, _factor_of)
)
