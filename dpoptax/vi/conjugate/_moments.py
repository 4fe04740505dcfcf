"""Posterior of the second moments of a linear regression, given the moments with noise.

Let M = Z'Z with the rows z_i = (x_i, y_i). Under y = x'β + σ ε and the prior
β | σ² ~ N(0, σ²/λ I), σ² ~ InverseGamma(a, b), M is sufficient, and β and σ² can be integrated out.
With S = X'X, q = X'y and the residual sum of squares r = y'y - q'S⁻¹q,

    p(q, y'y | S) ∝ |S|^(-1/2) r^((N-d)/2-1) |S + λI|^(-1/2) ((r + δ)/2)^(-(a+N/2))
    δ = 2b + λ h'(S + λI)⁻¹ q,  h = S⁻¹ q

So the posterior of M given M plus noise has a known density. It is sampled, and β, σ² given M are
drawn exactly. Nothing is approximated by the central limit theorem.

X'X has the prior of normal features with an unknown covariance, which is inverse Wishart:

    p(S) ∝ |S|^((N-d-1)/2) |S + ψI|^(-(N+ν)/2)

For N large it is flat on the scale of the noise, whatever the distribution of the features is.

Reference: Bernstein and Sheldon 2018, arXiv:1809.02188; 2019, arXiv:1910.11517 (linear regression).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray


class Hyperparameters(NamedTuple):
    """The prior, for features and labels that are bounded by one.

    Attributes:
        precision: λ, the precision of the coefficients in units of 1/σ².
        shape: a of the variance.
        rate: b of the variance.
        spread: ψ, the scale of the covariance of the features; ν is d + 1.
    """

    precision: float | Float[Array, ""]
    shape: float | Float[Array, ""]
    rate: float | Float[Array, ""]
    spread: float | Float[Array, ""]


class Factor(NamedTuple):
    """The moments as M = N L L', and the parts of L."""

    lower: Float[Array, "d d"]
    cross: Float[Array, " d"]
    log_residual: Float[Array, ""]
    num_examples: Float[Array, ""]

    @property
    def second_moments(self) -> Float[Array, "d d"]:
        """The product X'X."""
        return self.num_examples * multiply(self.lower, self.lower.T)

    @property
    def cross_moments(self) -> Float[Array, " d"]:
        """The product X'y."""
        return self.num_examples * multiply(self.lower, self.cross)

    @property
    def residual(self) -> Float[Array, ""]:
        """The residual sum of squares of least squares."""
        return self.num_examples * jnp.exp(2 * self.log_residual)

    @property
    def squares(self) -> Float[Array, ""]:
        """The product y'y."""
        return self.num_examples * jnp.sum(self.cross**2) + self.residual


def multiply(left: Array, right: Array) -> Array:
    """A matrix product in full precision on every device."""
    return jnp.matmul(left, right, precision="highest")


def log_evidence(factor: Factor, prior: Hyperparameters) -> Float[Array, ""]:
    """Returns log p(q, y'y | S) up to a constant, without cancellation for large N."""
    dim, half = len(factor.cross), factor.num_examples / 2
    residual = factor.residual
    # log r = log N + 2 log_residual, up to a constant.
    log_residual = 2 * factor.log_residual
    ratio = jnp.log1p(_delta(factor, prior) / residual)
    return (
        -half * ratio
        - prior.shape * (log_residual + ratio)
        - (dim / 2 + 1) * log_residual
        - jnp.sum(jnp.log(jnp.diagonal(factor.lower)))
        - _log_determinant(_shifted(factor, prior.precision)) / 2
    )


def log_features_prior(factor: Factor, prior: Hyperparameters) -> Float[Array, ""]:
    """Returns log p(S) up to a constant."""
    dim, num_examples = len(factor.cross), factor.num_examples
    inverse = solve_triangular(factor.lower, jnp.eye(dim), lower=True)
    # |S|^(N/2) |S + ψI|^(-N/2) as one determinant, which is close to 1.
    ratio = jnp.eye(dim) + prior.spread / num_examples * multiply(inverse, inverse.T)
    return (
        -num_examples / 2 * _log_determinant(jnp.linalg.cholesky(ratio))
        - (dim + 1) * jnp.sum(jnp.log(jnp.diagonal(factor.lower)))
        - (dim + 1) / 2 * _log_determinant(_shifted(factor, prior.spread))
    )


def draw_parameters(
    factor: Factor, prior: Hyperparameters, key: PRNGKeyArray
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Draws the coefficients and the variance given the moments."""
    variance_key, coefficients_key = jax.random.split(key)
    rate = (factor.residual + _delta(factor, prior)) / 2
    gamma = jax.random.gamma(variance_key, prior.shape + factor.num_examples / 2)
    variance = rate / gamma
    shifted = _shifted(factor, prior.precision)
    mean = cho_solve((shifted, True), factor.cross_moments)
    white = jax.random.normal(coefficients_key, mean.shape)
    noise = solve_triangular(shifted, white, lower=True, trans=1)
    return mean + jnp.sqrt(variance) * noise, variance


def _delta(factor: Factor, prior: Hyperparameters) -> Float[Array, ""]:
    least_squares = solve_triangular(factor.lower, factor.cross, lower=True, trans=1)
    ridge = cho_solve((_shifted(factor, prior.precision), True), factor.cross_moments)
    return 2 * prior.rate + prior.precision * jnp.sum(least_squares * ridge)


def _shifted(factor: Factor, amount: float | Array) -> Float[Array, "d d"]:
    """The Cholesky factor of X'X + amount I."""
    return jnp.linalg.cholesky(factor.second_moments + amount * jnp.eye(len(factor.cross)))


def _log_determinant(cholesky: Float[Array, "d d"]) -> Float[Array, ""]:
    return 2 * jnp.sum(jnp.log(jnp.diagonal(cholesky)))
