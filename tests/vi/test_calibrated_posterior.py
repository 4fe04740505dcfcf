"""Calibrated posteriors: closed forms, simulated worlds, and what is said of clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.vi import aligned_elbo, calibrated_posterior, calibration_check, choose_clip, guides
from dpoptax.vi._calibration_check import train_in_world
from dpoptax.vi._local_model import clipped
from dpoptax.vi._normal_posterior import normal_posterior
from dpoptax.vi._releases import releases_of

N, D, STEPS = 400, 2, 60


def log_likelihood(mean, x):
    return -0.5 * jnp.sum((x - mean) ** 2)


def simulate(key, mean):
    return mean + jax.random.normal(key, (D,))


def an_elbo(*, keep_steps=40, prior=2.0, num_samples=2):
    return aligned_elbo(
        guides.MeanField(jnp.zeros(D)), log_likelihood, prior, num_examples=N,
        keep_steps=keep_steps, num_samples=num_samples,
    )  # fmt: skip


def a_plan(clip=4.0, noise_multiplier=4.0, **changes):
    settings = {"sampler": dpoptax.samplers.Poisson(N, 100), "num_steps": STEPS, "delta": 1e-4}
    return dpoptax.Plan(clip=clip, noise_multiplier=noise_multiplier, **(settings | changes))


def trained(elbo, plan, data, seed=0):
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(
            lambda data, key: train_in_world(elbo, plan, optax.adam(0.05), data, key)
        )(data, jax.random.key(seed))  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return 0.7 + jax.random.normal(jax.random.key(5), (N, D))


@pytest.fixture(scope="module")
def precise(data):
    """A run with so little noise that the posterior must be the one without privacy."""
    sampler = dpoptax.samplers.Poisson(N, N)
    plan = a_plan(clip=20.0, noise_multiplier=1e-3, sampler=sampler)
    return plan, trained(an_elbo(), plan, data)


@pytest.mark.seconds
def test_releases_are_gradients_at_their_points(precise, data):
    """Without clipping and with hardly any noise, at both draws of a pair."""
    releases = releases_of(precise[1][1])
    assert releases.points.shape == (40, 2, D)
    expected = releases.points - data.mean(0)
    np.testing.assert_allclose(releases.noisy_gradients, expected, atol=2e-3)


@pytest.mark.seconds
@pytest.mark.parametrize("with_simulation", [True, False], ids=["simulated", "guide"])
def test_without_noise_it_is_the_posterior_in_closed_form(precise, data, with_simulation):
    plan, (params, opt_state) = precise
    found = calibrated_posterior(
        an_elbo(), params, opt_state, plan,
        simulate=simulate if with_simulation else None, key=jax.random.key(0),
    )  # fmt: skip
    precision = N + 1 / 2.0**2
    np.testing.assert_allclose(found.mean, N * data.mean(0) / precision, atol=0.005)
    np.testing.assert_allclose(found.stddev, precision**-0.5, rtol=0.05)
    assert found.noise_share < 0.05
    assert ("unknown" in found.statement) is not with_simulation


@pytest.mark.slow
def test_intervals_cover_and_are_little_wider_than_the_noise_requires():
    """60 worlds with two latents: a standard error of 0.027. The guide alone fails."""
    with jax.numpy_dtype_promotion("standard"):
        check = calibration_check(
            an_elbo(), a_plan(), optax.adam(0.05), simulate, num_worlds=60, key=jax.random.key(1)
        )
    assert check.standard_error >= 0.027
    assert abs(check.coverage - 0.9) < 3 * check.standard_error
    assert 0.9 < check.width_ratio < 1.5
    assert check.privacy_ratio > 1.1
    assert check.guide_coverage < 0.9 - 3 * check.standard_error
    assert check.calibrated
    assert "gives calibrated" in check.statement


@pytest.mark.slow
def test_a_clip_bound_that_is_too_low_is_named():
    skewed = lambda key, mean: mean + jax.random.exponential(key, (D,)) - 1  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        check = calibration_check(
            an_elbo(), a_plan(clip=0.3), optax.adam(0.05), skewed, num_worlds=8,
            key=jax.random.key(1),
        )  # fmt: skip
    assert check.clip_bias > 0.5
    assert "larger clip bound" in check.statement


@pytest.mark.seconds
def test_a_clip_bound_is_a_high_quantile_of_the_norms():
    """Norms are those of a normal vector in two dimensions: 2.15 to 3.26 for 0.9 to 0.995."""
    choice = choose_clip(an_elbo(), a_plan(), simulate, num_worlds=8, key=jax.random.key(0))
    assert 2.0 < choice.clip < 3.5
    assert choice.clipped_fraction < 0.11
    assert choice.privacy_ratio > 1
    assert f"{choice.clip:.3g}" in choice.statement


@pytest.mark.seconds
def test_little_noise_allows_a_larger_bound():
    bounds = [
        choose_clip(
            an_elbo(), a_plan(noise_multiplier=noise),
            lambda key, mean: mean + jax.random.exponential(key, (D,)) - 1,
            num_worlds=8, key=jax.random.key(0),
        ).clip
        for noise in (0.5, 30.0)
    ]  # fmt: skip
    assert bounds[0] > bounds[1]


def test_a_prior_density_gives_the_closed_form_of_a_normal_prior():
    from dpoptax.vi._likelihood_of_releases import ideal_likelihood

    likelihood = ideal_likelihood(jnp.array([[0.3, 0.1], [0.1, 0.2]]), 0.05, N, jnp.ones(D))
    start, key = jnp.zeros(D), jax.random.key(0)
    exact = normal_posterior(likelihood, 0.5, lambda flat: flat, start, key)
    density = lambda latents: -0.5 * jnp.sum(latents**2) / 0.5**2  # noqa: E731
    found = normal_posterior(likelihood, density, lambda flat: flat, start, key)
    np.testing.assert_allclose(found.mean, exact.mean, atol=1e-4)
    np.testing.assert_allclose(found.covariance, exact.covariance, rtol=1e-3, atol=1e-5)


@pytest.mark.seconds
def test_clipped_gradients_are_those_of_the_clip_rule():
    gradients = jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    weights = dpoptax.clipping.FlatClip(1.0).weights({"w": jnp.sum(gradients**2, axis=1)})
    np.testing.assert_allclose(clipped(gradients, 1.0), weights[:, None] * gradients, rtol=1e-5)
    assert np.isfinite(jax.jacobian(lambda g: clipped(g, 1.0))(gradients)).all()


def test_what_has_no_releases_or_changing_noise_is_refused(precise):
    plan, (params, opt_state) = precise
    key = jax.random.key(0)
    with pytest.raises(KeyError, match="keep_steps"):
        calibrated_posterior(an_elbo(), params, optax.adam(1.0).init(params), plan, key=key)
    schedule = optax.linear_schedule(2.0, 1.0, STEPS)
    for changed in (a_plan(clip=schedule), a_plan(noise_multiplier=schedule)):
        with pytest.raises(ValueError, match="one number for all steps"):
            calibrated_posterior(an_elbo(), params, opt_state, changed, key=key)
    with pytest.raises(ValueError, match="keep_steps=0"):
        calibration_check(an_elbo(keep_steps=0), plan, optax.adam(1.0), simulate, key=key)
    with pytest.raises(ValueError, match="draw_latents"):
        choose_clip(an_elbo(prior=lambda m: -jnp.sum(m**2)), plan, simulate, key=key)
