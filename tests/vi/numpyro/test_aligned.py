"""Aligned gradients for normal autoguides agree with the densities and draws of NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("numpyro")

import numpyro
import numpyro.distributions as dist
from numpyro.infer import autoguide
from numpyro.infer.util import log_density

from dpoptax import Plan, samplers
from dpoptax.vi import calibrated_posterior
from dpoptax.vi._calibration_check import train_in_world
from dpoptax.vi.numpyro import aligned_numpyro_elbo

N = 60
GUIDES = [
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
]


def model(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", N, subsample_size=len(x)):
        numpyro.sample("y", dist.Normal(x @ weights, scale), obs=y)


def data():
    x = jax.random.normal(jax.random.key(0), (N, 2))
    return x, x @ jnp.array([1.0, -0.5]) + 0.5 * jax.random.normal(jax.random.key(1), (N,))


def an_elbo(kind, keep_steps=0):
    with jax.numpy_dtype_promotion("standard"):
        return aligned_numpyro_elbo(
            model, kind(model), *data(), num_examples=N, keep_steps=keep_steps,
            init_key=jax.random.key(2),
        )  # fmt: skip


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.seconds
@pytest.mark.parametrize("kind", GUIDES)
def test_likelihood_and_prior_sum_to_the_log_density_of_numpyro(kind):
    elbo = an_elbo(kind)
    latents = {"weights": jnp.array([0.3, -0.2]), "scale": jnp.array(-0.4)}
    likelihood = jax.vmap(elbo.log_likelihood, in_axes=(None, 0))(latents, data()).sum()
    values = elbo.constrain_latents(latents)
    expected, _ = log_density(model, data(), {}, values)
    # The scale is the exponential of its latent, whose log derivative is the latent itself.
    found = likelihood + elbo.prior(latents)
    np.testing.assert_allclose(found, expected + latents["scale"], rtol=1e-5)


@pytest.mark.seconds
@pytest.mark.parametrize("kind", GUIDES)
def test_draws_and_their_density_are_those_of_the_autoguide(kind):
    elbo = an_elbo(kind)
    params = jax.tree.map(lambda leaf: leaf + 0.1, elbo.init())
    keys = jax.random.split(jax.random.key(4), 4000)
    ours = jax.vmap(lambda key: elbo.guide.apply({"params": params}, key))(keys)
    theirs = elbo.guide.autoguide.sample_posterior(
        jax.random.key(5), elbo.constrain(params), sample_shape=(4000,)
    )
    for name, value in elbo.constrain_latents(ours).items():
        spread = np.asarray(theirs[name]).std(0)
        # Four standard errors of a difference of means, and of a ratio of standard deviations.
        assert np.all(np.abs(value.mean(0) - theirs[name].mean(0)) < 4 * spread * (2 / 4000) ** 0.5)
        np.testing.assert_allclose(value.std(0), spread, rtol=4 * 4000**-0.5)
    flat = jnp.concatenate([jnp.atleast_2d(ours[name].T) for name in elbo.guide.shapes]).T
    covariance = np.cov(np.asarray(flat).T)
    one = jax.tree.map(lambda leaf: leaf[0], ours)
    centred = np.asarray(flat[0] - flat.mean(0))
    expected = -0.5 * (
        centred @ np.linalg.solve(covariance, centred)
        + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    found = elbo.guide.apply({"params": params}, one, method="log_prob")
    np.testing.assert_allclose(found, expected, atol=0.3)


@pytest.mark.seconds
def test_examples_are_simulated_by_the_model():
    elbo = an_elbo(autoguide.AutoNormal)
    simulate = elbo.simulator(lambda key: (jnp.array([1.0, 2.0]), None))
    latents = {"weights": jnp.array([1.0, 1.0]), "scale": jnp.log(0.1)}
    keys = jax.random.split(jax.random.key(0), 1000)
    x, y = jax.vmap(simulate, in_axes=(0, None))(keys, latents)
    assert x.shape == (1000, 2)
    assert abs(float(y.mean()) - 3) < 4 * 0.1 / 1000**0.5
    draws = jax.vmap(elbo.draw_latents)(keys)
    assert abs(float(jnp.std(draws["weights"])) - 1) < 4 * (1 / 4000) ** 0.5
    with pytest.raises(ValueError, match="None"):
        elbo.simulator(lambda key: (jnp.ones(2), jnp.ones(())))(keys[0], latents)


def posterior_after(num_steps, kind):
    """Returns the posterior after a run with hardly any noise."""
    elbo = an_elbo(kind, keep_steps=200)
    plan = Plan(
        sampler=samplers.Poisson(N, N), clip=100.0, noise_multiplier=1e-4, num_steps=num_steps,
        delta=1e-3,
    )  # fmt: skip
    run = jax.jit(lambda key: train_in_world(elbo, plan, optax.adam(0.03), data(), key))
    params, opt_state = run(jax.random.key(0))
    simulate = elbo.simulator(lambda key: (jax.random.normal(key, (2,)), None))
    return calibrated_posterior(
        elbo, params, opt_state, plan, simulate=simulate, key=jax.random.key(1)
    )


def least_squares():
    """Returns weights, their standard deviations and the log scale of the residuals."""
    x, y = (np.asarray(part, float) for part in data())
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    scale = np.std(y - x @ weights)
    return weights, scale / np.sqrt(np.sum(x**2, 0)), np.log(scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal])
def test_with_little_noise_the_posterior_is_that_of_a_linear_regression(kind):
    found = posterior_after(1000, kind)
    weights, stddev, log_scale = least_squares()
    assert np.all(np.abs(found.mean["weights"] - weights) < 0.5 * stddev)
    np.testing.assert_allclose(found.stddev["weights"], stddev, rtol=0.25)
    # The information about a log scale is 2 N.
    assert abs(found.mean["scale"] - log_scale) < 0.7 * (2 * N) ** -0.5
    np.testing.assert_allclose(found.stddev["scale"], (2 * N) ** -0.5, rtol=0.25)
    assert "small" in found.statement
    draws = found.sample(jax.random.key(2), 10)
    assert draws["weights"].shape == (10, 2)
    assert np.all(draws["scale"] > 0)


@pytest.mark.slow
def test_a_run_that_had_not_settled_is_named_and_its_posterior_is_still_near():
    """The points are four standard deviations away: simulation at them alone misses by 1.4."""
    found = posterior_after(300, autoguide.AutoNormal)
    weights, stddev, _ = least_squares()
    assert found.distance > 3
    assert "had not settled" in found.statement
    assert np.all(np.abs(found.mean["weights"] - weights) < stddev)


@pytest.mark.seconds
@pytest.mark.untyped
def test_other_guides_and_latents_of_examples_are_refused():
    with pytest.raises(TypeError, match="AutoIAFNormal"):
        an_elbo(autoguide.AutoIAFNormal)
