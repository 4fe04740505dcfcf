"""Weighted draws of a posterior: a skewed one, a normal one, and one that is far from normal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpoptax.vi._likelihood_of_releases import NormalLikelihood
from dpoptax.vi._normal_posterior import Normal, normal_posterior
from dpoptax.vi._weighted_draws import weighted_draws


def likelihood(precision, mean):
    zero = jnp.zeros(())
    return NormalLikelihood(precision, precision @ mean, zero, zero + 1, jnp.zeros_like(mean))


def draws_of(given, log_prior, size):
    found = normal_posterior(
        given, log_prior, lambda flat: flat, jnp.zeros(size), jax.random.key(0)
    )
    return found, weighted_draws(given, log_prior, lambda flat: flat, found, jax.random.key(1))


@pytest.mark.seconds
def test_a_skewed_posterior_has_its_own_quantiles_and_not_those_of_a_normal_one():
    # The log of a gamma variable, without a likelihood.
    shape = 1.0
    nothing = likelihood(jnp.zeros((1, 1)), jnp.zeros(1))
    closest, draws = draws_of(nothing, lambda flat: shape * flat[0] - jnp.exp(flat[0]), 1)
    levels = np.array([0.05, 0.95])
    expected = np.log(stats.gamma(shape).ppf(levels))
    # The standard error of a quantile, with half of the draws effective.
    density = stats.gamma(shape).pdf(np.exp(expected)) * np.exp(expected)
    error = np.sqrt(levels * (1 - levels) / 2048) / density
    found = np.quantile(draws[:, 0], levels)
    assert np.all(np.abs(found - expected) < 4 * error)
    normal = closest.mean[0] + stats.norm.ppf(levels) * jnp.sqrt(closest.covariance[0, 0])
    assert np.any(np.abs(normal - expected) > 6 * error)


@pytest.mark.seconds
def test_a_normal_posterior_keeps_its_moments_in_sixteen_dimensions():
    size = 16
    root = jax.random.normal(jax.random.key(2), (size, size)) / 4 + jnp.eye(size)
    given = likelihood(root @ root.T, jnp.linspace(-1.0, 1.0, size))
    closest, draws = draws_of(given, lambda flat: -jnp.sum(flat**2) / 2, size)
    stddev = jnp.sqrt(jnp.diag(closest.covariance))
    # At least a quarter of the draws is effective.
    error = 1 / 1024**0.5
    np.testing.assert_allclose(draws.mean(0) / stddev, closest.mean / stddev, atol=4 * error)
    np.testing.assert_allclose(draws.std(0) / stddev, 1, atol=4 * error)


@pytest.mark.seconds
def test_uneven_weights_leave_the_closest_normal_distribution():
    nothing = likelihood(jnp.zeros((1, 1)), jnp.zeros(1))
    narrow = Normal(jnp.zeros(1), jnp.eye(1))
    # All mass is at a point that no draw comes close to; or the density is not a number.
    for log_prior in (
        lambda flat: -1e6 * (flat[0] - 0.1234567) ** 2,
        lambda flat: flat[0] * jnp.nan,
    ):
        draws = weighted_draws(nothing, log_prior, lambda flat: flat, narrow, jax.random.key(1))
        np.testing.assert_allclose([draws.mean(), draws.std()], [0.0, 1.0], atol=0.1)
