"""The negative ELBO against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.vi import local_elbo_loss


def linear_gaussian(params, latent, example):
    """log N(example; params * latent, 1)."""
    return -0.5 * jnp.sum((example - params["w"] * latent) ** 2) - 0.5 * math.log(2 * math.pi)


def encode(params, example):
    return params["m"] * example, jnp.exp(params["s"]) * jnp.ones_like(example)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [1, 8])
def test_at_the_exact_posterior_the_bound_is_the_evidence(num_samples):
    # x = w z + N(0, 1), z ~ N(0, 1): q(z | x) = N(w x / (1 + w^2), 1 / (1 + w^2)).
    w, x = 1.5, jnp.array([0.7])
    params = {
        "w": jnp.asarray(w),
        "m": jnp.asarray(w / (1 + w**2)),
        "s": jnp.asarray(-0.5 * math.log1p(w**2)),
    }
    loss_fn = local_elbo_loss(encode, linear_gaussian, num_samples=num_samples)
    keys = jax.random.split(jax.random.key(0), 4000)
    losses = jax.vmap(lambda key: loss_fn(params, x, key))(keys)
    evidence = -0.5 * float(x[0]) ** 2 / (1 + w**2) - 0.5 * math.log(2 * math.pi * (1 + w**2))
    standard_error = float(losses.std()) / math.sqrt(len(keys))
    assert abs(float(losses.mean()) + evidence) < 4.5 * standard_error
    worse = jax.vmap(lambda key: loss_fn({**params, "s": jnp.zeros(())}, x, key))(keys)
    assert float(worse.mean()) > -evidence + 4.5 * standard_error


@pytest.mark.slow
def test_it_is_a_loss_of_one_example_with_a_key_of_its_own():
    params = {"w": jnp.ones(()), "m": jnp.ones(()), "s": jnp.zeros(())}
    grads_fn = dpoptax.value_and_per_example_grads(local_elbo_loss(encode, linear_gaussian))
    losses, grads = grads_fn(params, jnp.ones((6, 1)), key=jax.random.key(1))
    assert losses.shape == (6,)
    assert len(np.unique(losses)) == 6  # equal examples, different draws
    assert set(grads.squared_norms()) == set(params)
