"""Posteriors of linear regression, and of mean and variance, by simulation and closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.vi.conjugate import (
    LinearRegression,
    NormalMeanVariance,
    _normal,
    _regression_posterior,
)
from dpoptax.vi.conjugate._hmc import split_r_hat, warn_of_r_hat

KEY = jax.random.key(0)
NUM_EXAMPLES, NUM_DRAWS = 300, 512
# Labels reach a fifth of the bound, so that clipping plays no part.
PRIOR = {"coefficient_scale": 1.0, "variance_shape": 6.0, "variance_scale": 5.0}
REGRESSION = LinearRegression(num_features=2, x_bound=1.0, y_bound=20.0, **PRIOR)
NORMAL = NormalMeanVariance(
    lower=-20.0, upper=20.0, mean_scale=2.0, variance_shape=6.0, variance_scale=5.0
)


def draw_prior(key, num_coefficients, scale):
    variance_key, coefficient_key = jax.random.split(key)
    variance = 5.0 / jax.random.gamma(variance_key, 6.0)
    white = jax.random.normal(coefficient_key, (num_coefficients,))
    return scale * jnp.sqrt(variance) * white, variance


@jax.jit
def regression_world(key, stddev):
    """Draws truth and data from the prior, and returns ranks and draws of the posterior."""
    keys = jax.random.split(key, 5)
    truth, variance = draw_prior(keys[0], 2, 1.0)
    x = jax.random.normal(keys[1], (NUM_EXAMPLES, 2))
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1)
    y = x @ truth + jnp.sqrt(variance) * jax.random.normal(keys[2], (NUM_EXAMPLES,))
    values = REGRESSION._statistics(x, y).sum(axis=0)
    values = values + stddev * jax.random.normal(keys[3], values.shape)
    prior = REGRESSION._prior()
    (coefficients, variances), r_hat = _regression_posterior.draw(
        values, stddev, keys[4], prior, NUM_EXAMPLES, NUM_DRAWS
    )
    draws = jnp.append(coefficients * 20.0, variances[:, None] * 400.0, axis=1)
    return x, y, values, draws, jnp.append(truth, variance), r_hat


@jax.jit
def normal_world(key, stddev):
    """The same for mean and variance."""
    keys = jax.random.split(key, 4)
    truth, variance = draw_prior(keys[0], 1, 2.0)
    x = truth + jnp.sqrt(variance) * jax.random.normal(keys[1], (NUM_EXAMPLES,))
    values = NORMAL._statistics(x).sum(axis=0)
    values = values + stddev * jax.random.normal(keys[2], (2,))
    (means, variances), r_hat = _normal._draw(
        values, stddev, keys[3], NORMAL._prior(), NUM_EXAMPLES, NUM_DRAWS
    )
    draws = jnp.append(means * 20.0, variances[:, None] * 400.0, axis=1)
    return x, values, draws, jnp.append(truth, variance), r_hat


def covered(draws, truth):
    """Whether the 90 % intervals hold the truth: (worlds, parameters)."""
    rank = np.mean(np.asarray(draws) < np.asarray(truth)[:, None], axis=1)
    return (rank > 0.05) & (rank < 0.95)


def conjugate_posterior(x, y, scale):
    """Mean and covariance of the coefficients over σ², and rate of σ², given the data."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    precision = x.T @ x + np.eye(x.shape[1]) / scale**2
    mean = np.linalg.solve(precision, x.T @ y)
    return mean, np.linalg.inv(precision), 5.0 + (y @ y - mean @ (x.T @ y)) / 2


def check_closed_form(draws, x, y, scale):
    """Almost without noise, the posterior is that of the data."""
    mean, covariance, rate = conjugate_posterior(x, y, scale)
    shape = 6.0 + NUM_EXAMPLES / 2
    variance = rate / (shape - 1)
    stddev = np.sqrt(variance * np.diagonal(covariance))
    found = np.asarray(draws, np.float64)
    # Draws are correlated a little: four standard errors of half as many independent ones.
    error = 4 / math.sqrt(NUM_DRAWS / 2)
    assert np.abs((found[:, :-1].mean(axis=0) - mean) / stddev).max() < error
    assert np.abs(found[:, :-1].std(axis=0) / stddev - 1).max() < error / math.sqrt(2)
    assert abs(found[:, -1].mean() / variance - 1) < error / math.sqrt(shape - 2)


@pytest.mark.slow
def test_intervals_of_a_regression_cover():
    """Worlds from the prior; noise that doubles the width, and almost none."""
    worlds = 120
    keys = jax.random.split(KEY, worlds + 1)
    # In units of the bounds y has a standard deviation of about .06.
    noise = jnp.full(worlds + 1, 1.0).at[-1].set(0.002)
    x, y, values, draws, truth, r_hat = jax.vmap(regression_world)(keys, noise)
    assert float(r_hat.max()) < 1.05
    check_closed_form(draws[-1], x[-1], y[-1], 1.0)
    standard_error = math.sqrt(0.9 * 0.1 / worlds)
    found = covered(draws, truth)[:-1].mean(axis=0)
    print(f"coverage of coefficients and variance: {found}")
    assert np.abs(found - 0.9).max() < 3.5 * standard_error
    # Power: the moments with noise taken for the true ones.
    factor = np.asarray(jax.vmap(functools.partial(_regression_posterior.matrix, size=3))(values))
    naive = []
    for moments, beta in zip(factor[:-1], np.asarray(truth)[:-1, :2], strict=True):
        precision = moments[:2, :2] + np.eye(2) * 1e-3
        mean = np.linalg.solve(precision, moments[:2, 2])
        residual = max(moments[2, 2] - mean @ moments[:2, 2], 1e-3) / NUM_EXAMPLES
        stddev = np.sqrt(residual * np.diagonal(np.linalg.inv(precision)))
        naive.append(np.abs(20 * mean - beta) < 1.645 * 20 * stddev)
    assert np.mean(naive) < 0.9 - 5 * standard_error


@pytest.mark.slow
def test_intervals_of_mean_and_variance_cover():
    worlds = 100
    keys = jax.random.split(KEY, worlds + 1)
    noise = jnp.full(worlds + 1, 3.0).at[-1].set(0.002)
    x, values, draws, truth, r_hat = jax.vmap(normal_world)(keys, noise)
    assert float(r_hat.max()) < 1.05
    check_closed_form(draws[-1], np.ones((NUM_EXAMPLES, 1)), x[-1], 2.0)
    standard_error = math.sqrt(0.9 * 0.1 / worlds)
    found = covered(draws, truth)[:-1].mean(axis=0)
    print(f"coverage of mean and variance: {found}")
    assert np.abs(found - 0.9).max() < 3.5 * standard_error
    mean, square = np.asarray(values, np.float64)[:-1].T / NUM_EXAMPLES
    variance = np.maximum(square + 0.5 - mean**2, 1e-3)
    naive = np.abs(mean * 20 - np.asarray(truth)[:-1, 0]) < 1.645 * 20 * np.sqrt(
        variance / NUM_EXAMPLES
    )
    assert naive.mean() < 0.9 - 5 * standard_error


@pytest.mark.nightly
@pytest.mark.parametrize("noise_multiplier", [1.1, 3.7], ids=["epsilon 4", "epsilon 1"])
def test_intervals_of_a_larger_regression_cover(noise_multiplier):
    worlds, num_examples = 200, 2000
    model = LinearRegression(num_features=5, x_bound=1.0, y_bound=8.0, **PRIOR)

    def world(key):
        keys = jax.random.split(key, 5)
        truth, variance = draw_prior(keys[0], 5, 1.0)
        x = jax.random.normal(keys[1], (num_examples, 5))
        x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        y = x @ truth + jnp.sqrt(variance) * jax.random.normal(keys[2], (num_examples,))
        values, stddev = model._noisy_sum(keys[3], (x, y), noise_multiplier)
        (coefficients, _), r_hat = _regression_posterior.draw(
            values, stddev, keys[4], model._prior(), num_examples, NUM_DRAWS
        )
        return coefficients * 8.0, truth, r_hat

    draws, truth, r_hat = jax.vmap(world)(jax.random.split(KEY, worlds))
    assert float(r_hat.max()) < 1.05
    assert abs(covered(draws, truth).mean() - 0.9) < 3 * math.sqrt(0.9 * 0.1 / worlds)


@pytest.mark.slow
def test_the_posterior_of_a_release_is_in_the_units_of_the_data():
    x = 3 + 2 * jax.random.normal(KEY, (1000,))
    ledger = dpoptax.accounting.Ledger(dpoptax.samplers.Poisson(1000, 1000), clip=1.0, delta=1e-5)
    model = NormalMeanVariance(lower=-10.0, upper=20.0)
    noisy = model.release(x, noise_multiplier=2.0, ledger=ledger, key=KEY)
    draws = model.posterior(noisy, key=KEY)
    stddev = math.hypot(2 / math.sqrt(1000), 15 * noisy.noise_stddev / 1000)
    assert abs(float(draws["mean"].mean()) - 3) < 4 * stddev
    assert abs(float(draws["mean"].std()) / stddev - 1) < 0.15
    assert 3 < float(draws["variance"].mean()) < 5


@pytest.mark.seconds
def test_chains_that_disagree_are_found():
    draws = jax.random.normal(KEY, (8, 64, 3))
    assert float(split_r_hat(draws)) < 1.05
    apart = draws.at[0, :, 1].add(2.0)
    assert float(split_r_hat(apart)) > 1.05
    with pytest.warns(RuntimeWarning, match="did not agree"):
        warn_of_r_hat(split_r_hat(apart))
