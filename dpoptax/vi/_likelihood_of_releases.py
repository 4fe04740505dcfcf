"""The likelihood of the latents given the releases of a run, as a normal density.

In the eigenbasis of the slope, J = U D U^T and v = D^(1/2) U^T (latents - c), the release of step t
at the draws s = 1..S is

    U^T g_ts = D^(1/2) (b + (1 + e) v_ts) + noise_ts

with unknown b, the gradient at c, and unknown e, the relative error of the slope. The errors of the
directions have a part in common, as if covariates were larger than simulated ones. The
privacy noise has standard deviation sqrt(S) sigma C / B for each draw; the mean over draws also has
the noise of the batch, with covariance (1 - q) E[g g^T] / B. Both are known, so b and e follow from
a Bayesian linear regression. The points depend on earlier releases, which does not change the
likelihood. Where the data are in full, their optimum is v* = (gradient - b) / (1 + e); the latents
themselves differ from it by the sampling error N(0, (N A)^-1). Hence

    likelihood of v = N(E v*, E (N A)^-1 + Cov v* + bias bias^T)

Directions without slope, such as a scale that only the prior sees, get zero precision.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax.vi._antithetic import antithetic_normal
from dpoptax.vi._local_model import LocalModel
from dpoptax.vi._releases import Releases

# Draws of the relative error of the slope.
_NUM_DRAWS = 256
# Directions with a smaller part of the largest slope have none.
_NO_SLOPE = 1e-5
# A slope below this part of the expected one is taken as this part.
_LEAST_SLOPE = 0.2


class NoiseLevel(NamedTuple):
    """What is known of the noise of a release.

    Attributes:
        stddev: of the privacy noise in each coordinate of the mean over draws.
        batch: factor of the second moment of gradients: (1 - sampling rate) / batch size.
        num_examples: N.
        l2_clip: the clip bound.
    """

    stddev: float
    batch: float
    num_examples: int
    l2_clip: float


class SlopePrior(NamedTuple):
    """The prior of the relative error of the slope.

    Attributes:
        each: standard deviation of the part that each direction has for itself.
        common: standard deviation of the part that all directions share.
    """

    each: float
    common: float


class NormalLikelihood(NamedTuple):
    """A normal likelihood in terms of its precision, which may be singular.

    Attributes:
        precision: of the latents.
        shift: precision times the mean.
        noise_share: the part of its variance that is not sampling error, averaged.
        slope: the mean of 1 + e over directions, weighted by their slope.
        bias_shift: precision times the bias of clipping, which is corrected.
    """

    precision: Float[Array, "latents latents"]
    shift: Float[Array, " latents"]
    noise_share: Float[Array, ""]
    slope: Float[Array, ""]
    bias_shift: Float[Array, " latents"]


class _Regression(NamedTuple):
    error: Array
    error_covariance: Array
    gradient: Array
    gradient_per_error: Array
    gradient_covariance: Array


def likelihood_of_releases(
    releases: Releases,
    centre: Float[Array, " latents"],
    local: LocalModel,
    noise: NoiseLevel,
    slope_prior: SlopePrior,
    key: PRNGKeyArray,
) -> NormalLikelihood:
    """Returns the likelihood of the latents; see the module."""
    values, vectors = jnp.linalg.eigh(local.slope)
    has_slope = values > _NO_SLOPE * values[-1]
    root = jnp.sqrt(jnp.where(has_slope, values, 0))
    fitted = _regress(releases, centre, vectors, root, local, noise, slope_prior)
    normal = antithetic_normal(key, _NUM_DRAWS, len(root))
    spread = jnp.linalg.cholesky(fitted.error_covariance)
    errors = jnp.maximum(fitted.error + normal @ spread.T, _LEAST_SLOPE - 1)
    safe = jnp.where(has_slope, root, 1)
    bias = jnp.where(has_slope, vectors.T @ local.bias / safe, 0)
    expected = jnp.where(has_slope, vectors.T @ local.gradient / safe, 0)
    gradients = fitted.gradient + (errors - fitted.error) @ fitted.gradient_per_error.T
    optima = (expected - gradients) / (1 + errors)
    curvature = vectors.T @ local.curvature @ vectors / jnp.outer(safe, safe)
    curvature = jnp.where(jnp.outer(has_slope, has_slope), curvature, jnp.eye(len(root)))
    excess = curvature - jnp.eye(len(root))

    def sampling_covariance(error: Array) -> Array:
        return jnp.linalg.inv(jnp.diag(1 + error) + excess) / noise.num_examples

    sampling = jax.vmap(sampling_covariance)(errors).mean(0)
    inverse_slope = 1 / (1 + errors)
    within = fitted.gradient_covariance * (inverse_slope.T @ inverse_slope) / len(errors)
    covariance = sampling + within + jnp.cov(optima.T).reshape(within.shape)
    covariance = covariance + jnp.outer(bias, bias)
    scaled_root = vectors * root
    inverse = jnp.linalg.inv(covariance)
    weight = root**2 / jnp.sum(root**2)
    return NormalLikelihood(
        precision=scaled_root @ inverse @ scaled_root.T,
        shift=scaled_root @ (inverse @ (optima.mean(0) + root * (vectors.T @ centre))),
        noise_share=jnp.sum(weight * (1 - jnp.diag(sampling) / jnp.diag(covariance))),
        slope=jnp.sum(weight * (1 + fitted.error)),
        bias_shift=scaled_root @ (inverse @ bias),
    )


def ideal_likelihood(
    curvature: Float[Array, "latents latents"],
    stddev: float,
    num_examples: int,
    mean: Float[Array, " latents"],
) -> NormalLikelihood:
    """Returns the narrowest likelihood, for a curvature that is known.

    Args:
        curvature: A, the mean Hessian.
        stddev: of the noise of the mean of all releases, in each coordinate.
        num_examples: N.
        mean: of the likelihood.
    """
    values, vectors = jnp.linalg.eigh(curvature)
    values = jnp.maximum(values, 0)
    # 1 / (1 / (N a) + (stddev / a)**2), also where a is zero.
    scale = values + num_examples * stddev**2
    precision = jnp.where(values > 0, num_examples * values**2 / jnp.where(scale > 0, scale, 1), 0)
    matrix = (vectors * precision) @ vectors.T
    zero = jnp.zeros(())
    return NormalLikelihood(matrix, matrix @ mean, zero, zero + 1, jnp.zeros_like(mean))


def _regress(
    releases: Releases,
    centre: Array,
    vectors: Array,
    root: Array,
    local: LocalModel,
    noise: NoiseLevel,
    slope_prior: SlopePrior,
) -> _Regression:
    """Returns the posterior of the gradient at the centre, and of the error of the slope."""
    num_steps, num_draws, _ = releases.points.shape
    inputs = (releases.points - centre) @ vectors * root
    assert local.change is not None
    rest = (releases.noisy_gradients - local.change) @ vectors
    mean_inputs, mean_rest = inputs.mean(1), rest.mean(1)
    # The privacy noise of the draws is independent; that of the batch is common to them.
    covariance = noise.stddev**2 * jnp.eye(len(root))
    covariance += noise.batch * vectors.T @ local.second_moment @ vectors
    solved = jnp.linalg.inv(covariance)
    weight = root[:, None] * solved * root
    explained = mean_rest @ solved * root
    own_inputs, own_rest = inputs - mean_inputs[:, None], rest - mean_rest[:, None]
    own_variance = num_draws * noise.stddev**2
    # Normal equations of (b, e); a direction without slope keeps the prior.
    floor = 1e-6 * num_steps * jnp.max(jnp.diag(weight))
    of_gradient = num_steps * weight + floor * jnp.eye(len(root))
    mixed = weight * mean_inputs.sum(0)
    error_prior = slope_prior.each**2 * jnp.eye(len(root)) + slope_prior.common**2
    of_error = weight * (mean_inputs.T @ mean_inputs) + jnp.linalg.inv(error_prior)
    of_error += jnp.diag(root**2 * jnp.sum(own_inputs**2, (0, 1)) / own_variance)
    target = explained.sum(0)
    error_target = jnp.sum(explained * mean_inputs, 0)
    error_target += root * jnp.sum(own_inputs * own_rest, (0, 1)) / own_variance
    gradient_covariance = jnp.linalg.inv(of_gradient)
    per_error = -gradient_covariance @ mixed
    error_covariance = jnp.linalg.inv(of_error + mixed.T @ per_error)
    error = error_covariance @ (error_target + per_error.T @ target)
    # A flat prior of b is not flat for the optimum -b / (1 + e): its density grows with 1 + e in
    # each direction. Without that factor slopes are not overestimated.
    growth = jnp.where(root > 0, 1 / jnp.maximum(1 + error, _LEAST_SLOPE), 0)
    error = error - error_covariance @ growth
    return _Regression(
        error=error,
        error_covariance=error_covariance,
        gradient=gradient_covariance @ target + per_error @ error,
        gradient_per_error=per_error,
        gradient_covariance=gradient_covariance,
    )
