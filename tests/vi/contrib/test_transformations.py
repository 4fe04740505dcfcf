"""Scaled and natural gradients of a mean field, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.transforms import chain, scale_then_privatize
from dpoptax.vi import guides
from dpoptax.vi.contrib import mean_field_scale, natural_gradient

PARAMS = {"loc": jnp.array([0.3, -1.0]), "raw_scale": jnp.array([-2.0, 1.0])}


@pytest.mark.seconds
def test_a_mean_field_is_scaled_before_the_clip():
    grads_fn = dpoptax.per_example_grads(lambda p, x: jnp.sum(p["loc"] * x), allow_unused=True)
    grads = grads_fn(PARAMS, jnp.array([[1.0, 2.0], [jnp.nan, 1.0]]), mask=jnp.array([True, False]))
    private = dpoptax.privatize(100.0, 0.0, expected_batch_size=1, key=jax.random.key(0))
    tx = chain(private, scale_then_privatize(optax.identity(), scale=mean_field_scale))
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["loc"], [1.0, 2.0], rtol=1e-6)
    noisy = dpoptax.privatize(1.0, 2.0, expected_batch_size=1, key=jax.random.key(1))
    many = {"loc": jnp.zeros(4000), "raw_scale": jnp.full(4000, -2.0)}
    tx = chain(noisy, scale_then_privatize(optax.identity(), scale=mean_field_scale))
    zeros = jax.tree.map(lambda v: jnp.zeros((1, *v.shape)), many)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(many), many)
    assert abs(float(updates["loc"].std()) - 2) < 0.1
    assert abs(float(updates["raw_scale"].std()) - 2 * jax.nn.sigmoid(-2.0)) < 0.02


@pytest.mark.slow
def test_the_natural_gradient_is_the_inverse_fisher_information_times_the_gradient():
    """The Fisher information as the mean of squared scores over draws."""
    guide = guides.MeanField(jnp.zeros(2))

    def score(key):
        latents = guide.apply({"params": PARAMS}, key)
        return jax.grad(
            lambda guide_params: guide.apply({"params": guide_params}, latents, method="log_prob")
        )(PARAMS)

    n = 50_000
    scores = jax.vmap(score)(jax.random.split(jax.random.key(0), n))
    fisher = jax.tree.map(lambda leaf: jnp.mean(leaf**2, axis=0), scores)
    gradient = {"loc": jnp.array([1.0, -2.0]), "raw_scale": jnp.array([0.5, 3.0])}
    tx = natural_gradient()
    updates, _ = tx.update(gradient, tx.init(PARAMS), PARAMS)
    for name, leaf in updates.items():
        np.testing.assert_allclose(leaf, gradient[name] / fisher[name], rtol=0.05)


def test_a_natural_gradient_needs_parameters_and_says_so():
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        natural_gradient().update(PARAMS, natural_gradient().init(PARAMS))
