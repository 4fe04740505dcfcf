"""Predictive checks: p-values are uniform under the model, and small where it does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpoptax.mechanisms import norm_histogram
from dpoptax.vi import nonprivate_predictive_check, predictive_check

N, DRAWS, WORLDS, NOISE = 200, 100, 100, 8.0
EDGES = (0.0, 0.5, 1.0, 2.0)


def counts(y):
    return jnp.histogram(jnp.abs(y), jnp.array([*EDGES, jnp.inf]))[0]


def p_values(scale, noise_stddev):
    """Returns overall and single p-values for data with this scale, where the model says 1."""
    overall, single = [], []
    for key in jax.random.split(jax.random.key(0), WORLDS):
        data_key, noise_key, draws_key, check_key = jax.random.split(key, 4)
        y = scale * jax.random.normal(data_key, (N,))
        released = norm_histogram({"y": y}, EDGES, NOISE, noise_key)
        replicated = jax.random.normal(draws_key, (DRAWS, N))
        check = predictive_check(released, replicated, counts, check_key, noise_stddev=noise_stddev)
        overall.append(check.overall_p_value)
        single.append(check.p_values)
    return np.array(overall), np.array(single)


@pytest.mark.slow
def test_p_values_are_uniform_under_the_model_and_small_beside_it():
    """The mean of uniform p-values has a standard error of sqrt(1 / 12 / WORLDS)."""
    error = np.sqrt(1 / 12 / WORLDS)
    overall, single = p_values(1.0, NOISE)
    assert abs(overall.mean() - 0.5) < 4.5 * error
    assert abs(np.mean(overall < 0.1) - 0.1) < 4.5 * np.sqrt(0.09 / WORLDS)
    assert np.all(np.abs(single.mean(axis=0) - 0.5) < 4.5 * error)
    # Without the noise of the release, the check would reject a model that is right.
    assert p_values(1.0, 0.0)[0].mean() < 0.5 - 4.5 * error
    assert p_values(1.5, NOISE)[0].mean() < 0.1


@pytest.mark.seconds
def test_a_check_on_the_data_themselves_sees_what_a_statistic_sees():
    replicated = jax.random.normal(jax.random.key(0), (DRAWS, N))
    y = 2 * jax.random.normal(jax.random.key(1), (N,))
    y -= y.mean()
    mean = nonprivate_predictive_check(y, replicated, jnp.mean)
    spread = nonprivate_predictive_check(y, replicated, jnp.std)
    assert mean.overall_p_value > 0.01
    assert spread.overall_p_value == pytest.approx(1 / (DRAWS + 1))
    # With ties counted half, a p-value of DRAWS smaller draws is 2 * .5 / (DRAWS + 1).
    assert float(spread.p_values) == pytest.approx(1 / (DRAWS + 1))
    np.testing.assert_allclose(spread.observed, jnp.std(y), rtol=1e-6)
    assert spread.replicated.shape == (DRAWS,)


def test_constant_statistics_do_not_divide_by_zero():
    check = nonprivate_predictive_check(jnp.ones(3), jnp.ones((4, 3)), lambda y: jnp.zeros(2))
    np.testing.assert_array_equal(check.p_values, 1.0)
    assert check.overall_p_value == 1.0


@pytest.mark.untyped
def test_bad_arguments_are_refused():
    key, replicated = jax.random.key(0), jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"has shape \(\); expected that of the observed"):
        predictive_check(jnp.ones(2), replicated, jnp.mean, key, noise_stddev=1.0)
    with pytest.raises(ValueError, match="at least two replicated data sets"):
        predictive_check(jnp.ones(()), replicated[:1], jnp.mean, key, noise_stddev=1.0)
    with pytest.raises(ValueError, match="noise_stddev"):
        predictive_check(jnp.ones(()), replicated, jnp.mean, key, noise_stddev=-1.0)
    with pytest.raises(TypeError, match="key"):
        predictive_check(
            jnp.ones(()), replicated, jnp.mean, jax.random.PRNGKey(0), noise_stddev=1.0
        )
