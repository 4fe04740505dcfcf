"""The VAE of the leaderboard: its budget, its components, and its training without data."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.accounting import event_epsilon
from leaderboard.component_vae import component_vae, train_on_own_images
from leaderboard.principal_components import (
    discriminants,
    private_components,
    split_budget,
    together,
)


@pytest.mark.seconds
@pytest.mark.parametrize("epsilon", [0.536, pytest.param(8.0, marks=pytest.mark.slow)])
def test_both_releases_together_keep_the_budget(epsilon):
    setting = (60_000, 1024, 500, 1 / 60_000)
    moments, noise = split_budget(epsilon, 0.3, *setting)
    spent = together(moments, noise, *setting)
    assert 0.98 * epsilon < spent <= epsilon
    # The plan that runs has smaller batches than its sampler would choose, which cost a little.
    num_examples, batch, num_steps, delta = setting
    sampler = dpoptax.samplers.Poisson(num_examples, batch)
    plan = dpoptax.Plan(
        sampler=sampler, clip=1.0, noise_multiplier=noise, num_steps=num_steps, delta=delta
    )
    releases = [dp_accounting.GaussianDpEvent(moments), plan.event()]
    assert spent >= event_epsilon(dp_accounting.ComposedDpEvent(releases), delta=delta)


@pytest.mark.seconds
def test_without_noise_the_scores_are_uncorrelated_with_variance_one():
    images = np.random.default_rng(0).uniform(size=(3000, 16)).astype(np.float32)
    start = private_components(images, 0.0, 1e-5, jax.random.key(0), latent=3, low=4)
    scores = images @ start.whiten - start.offset
    # The moments weight each row by its norm, so they are those of the data only roughly.
    assert np.allclose(np.cov(scores.T), np.eye(16), atol=0.15)
    assert np.allclose(start.basis.T @ start.basis, np.eye(16), atol=1e-4)


def test_discriminants_recover_a_single_pixel():
    # x = 1 where z + noise > 0: P(x = 1) = 1/2, cov(z, x) = phi(0) / sqrt(2).
    covariance = np.exp(0) / np.sqrt(2 * np.pi) / np.sqrt(2)
    weights, bias = discriminants(np.array([0.5]), np.array([[covariance]]))
    # d = cov / v and R^2 = cov^2 / v give d / (1 - R^2).
    expected = covariance / 0.25 / (1 - covariance**2 / 0.25)
    assert np.allclose(weights, expected)
    assert np.allclose(bias, 0.0)


@pytest.mark.slow
def test_training_on_own_images_moves_the_named_layers_only():
    images = np.random.default_rng(0).uniform(size=(50, 784)).astype(np.float32)
    start = private_components(images, 0.1, 1e-5, jax.random.key(0), latent=16, low=8)
    model = component_vae(start, wide=2)
    params = model.init(jax.random.key(1), start.bias)["params"]
    names = ("wide", "wide_posterior")
    with jax.numpy_dtype_promotion("standard"):  # for the schedule of Optax
        trained = train_on_own_images(model, params, names, jax.random.key(2), num_steps=2)
    moved = {
        name
        for name in params
        if not all(jax.tree.leaves(jax.tree.map(jnp.array_equal, params[name], trained[name])))
    }
    assert moved == set(names)
