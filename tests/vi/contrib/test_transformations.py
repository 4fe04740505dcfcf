"""Averages of iterates, scaled and natural gradients, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.vi import guides
from dpoptax.vi.contrib import (
    average_iterates,
    mean_field_scale,
    natural_gradient,
    polyak_average,
    scale_before_clip,
)

PARAMS = {"loc": jnp.array([0.3, -1.0]), "raw_scale": jnp.array([-2.0, 1.0])}


@pytest.mark.parametrize("start", [0, 3, 100])
def test_the_average_is_that_of_the_iterates_from_the_start_on(start):
    tx = optax.chain(optax.sgd(0.5), average_iterates(start=start))
    params, state = PARAMS, tx.init(PARAMS)
    iterates = []
    for step in range(8):
        gradient = jax.tree.map(lambda leaf, at=step: jnp.cos(leaf * at), params)
        updates, state = jax.jit(tx.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
        iterates.append(params)
    expected = jax.tree.map(lambda *rows: jnp.stack(rows).mean(0), *(iterates[start:] or [params]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), polyak_average(state), expected
    )


@pytest.mark.slow
def test_an_average_cuts_the_noise_of_private_iterates():
    tx = optax.chain(
        dpoptax.privatize(1.0, 1.0, expected_batch_size=10, key=jax.random.key(0)), optax.sgd(0.3),
        average_iterates(start=50),
    )  # fmt: skip
    params = jnp.zeros(500)

    def step(carry, _):
        params, state = carry
        # The gradient of a bowl around zero, as ten equal examples; the noise is of order 0.1.
        updates, state = tx.update(jnp.broadcast_to(params, (10, 500)), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=400)
    assert float(polyak_average(state).std()) < 0.5 * float(params.std())


def test_the_scaled_gradient_is_clipped_and_the_noise_is_scaled_back():
    factors = {"loc": 1.0, "raw_scale": jnp.array([10.0, 4.0])}
    grads = {"loc": jnp.array([[3.0, 0.0]]), "raw_scale": jnp.array([[0.4, 0.0]])}
    quiet = scale_before_clip(
        dpoptax.privatize(1.0, 0.0, expected_batch_size=1, key=jax.random.key(0)), lambda _: factors
    )
    updates, _ = quiet.update(grads, quiet.init(PARAMS), PARAMS)
    # The scaled gradient (3, 0; 4, 0) has norm 5 and is clipped to (0.6, 0; 0.8, 0).
    np.testing.assert_allclose(updates["loc"], [0.6, 0.0], rtol=1e-5)
    np.testing.assert_allclose(updates["raw_scale"], [0.08, 0.0], rtol=1e-5)
    many = {"loc": jnp.zeros(20_000), "raw_scale": jnp.zeros(20_000)}
    factors = {"loc": 1.0, "raw_scale": 10.0}
    tx = scale_before_clip(
        dpoptax.privatize(1.0, 2.0, expected_batch_size=1, key=jax.random.key(0)), lambda _: factors
    )
    updates, _ = tx.update(jax.tree.map(lambda v: v[None], many), tx.init(many), many)
    assert abs(float(updates["loc"].std()) - 2) < 0.05
    assert abs(float(updates["raw_scale"].std()) - 0.2) < 0.005


def test_padding_stays_out_of_scaled_gradients():
    grads_fn = dpoptax.per_example_grads(lambda p, x: jnp.sum(p["loc"] * x), allow_unused=True)
    grads = grads_fn(PARAMS, jnp.array([[1.0, 2.0], [jnp.nan, 1.0]]), mask=jnp.array([True, False]))
    tx = scale_before_clip(
        dpoptax.privatize(100.0, 0.0, expected_batch_size=1, key=jax.random.key(0)),
        mean_field_scale,
    )
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["loc"], [1.0, 2.0], rtol=1e-6)


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


def test_transformations_that_need_parameters_say_so():
    for tx in (
        average_iterates(),
        natural_gradient(),
        scale_before_clip(
            dpoptax.privatize(1.0, 1.0, expected_batch_size=1, key=jax.random.key(0)),
            mean_field_scale,
        ),
    ):
        with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
            tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="start must be at least 0"):
        average_iterates(start=-1)
    with pytest.raises(KeyError, match="average_iterates"):
        polyak_average(optax.sgd(1.0).init(PARAMS))
