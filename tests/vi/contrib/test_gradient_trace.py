"""Noise-aware posterior: nearer to the exact posterior, with intervals that cover the truth."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.vi import aligned_elbo, guides
from dpoptax.vi.contrib import noise_aware_posterior, trace_gradients

N, D, NOISE, STEPS, KEPT, RUNS = 1000, 4, 0.5, 1500, 500, 40


def log_likelihood(weights, example):
    x, y = example
    return -0.5 * ((y - x @ weights) / NOISE) ** 2


@pytest.mark.slow
def test_intervals_cover_the_truth_where_those_of_the_plain_guide_do_not():
    """Forty Bayesian linear regressions, each with other data, noise and batches."""
    guide = guides.MeanField(jnp.zeros(D), initial_scale=0.02)
    elbo = aligned_elbo(guide, log_likelihood, num_examples=N)
    guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
    sampler = dpoptax.samplers.Poisson(N, 200)

    def one(key):
        x_key, w_key, y_key, noise_key, sampling_key, model_key = jax.random.split(key, 6)
        x, weights = jax.random.normal(x_key, (N, D)), jax.random.normal(w_key, (D,))
        y = x @ weights + NOISE * jax.random.normal(y_key, (N,))
        tx = optax.chain(
            elbo.wrap(
                dpoptax.privatize(8.0, 24.0, expected_batch_size=200, key=noise_key), model_key
            ),
            trace_gradients(KEPT),
            optax.adam(optax.exponential_decay(0.1, STEPS, 0.02)),
        )
        step = dpoptax.training.make_train_step(elbo, tx=tx, sampler=sampler)
        state = dpoptax.training.init_state(
            guide_params, tx=tx, sampler=sampler, sampling_key=sampling_key, model_key=model_key
        )
        state = jax.lax.fori_loop(0, STEPS, lambda _, state: step(state, (x, y))[0], state)
        mean = jnp.linalg.solve(jnp.eye(D) + x.T @ x / NOISE**2, x.T @ y / NOISE**2)
        return state, weights, mean

    with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes integers and floats
        states, weights, means = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), RUNS))
    aware = [
        noise_aware_posterior(
            jax.tree.map(lambda leaf, i=i: leaf[i], states.params),
            jax.tree.map(lambda leaf, i=i: leaf[i], states.opt_state),
            num_examples=N,
        )
        for i in range(RUNS)
    ]
    posteriors = {
        "plain": states.params,
        "aware": jax.tree.map(lambda *row: jnp.stack(row), *aware),
    }
    covered, error = {}, {}
    for name, found in posteriors.items():
        z = np.asarray((found["loc"] - weights) / jax.nn.softplus(found["raw_scale"]))
        covered[name] = np.mean(np.abs(z) < 1.96)
        error[name] = float(jnp.abs(found["loc"] - means).mean())
    assert error["aware"] < 0.8 * error["plain"]
    # A true coverage of 95 % falls below this bound once in 300,000 runs.
    bound = 0.95 - 4.5 * math.sqrt(0.05 * 0.95 / (RUNS * D))
    assert covered["aware"] > bound > covered["plain"]


def test_a_trace_keeps_the_last_steps_in_a_ring():
    tx = trace_gradients(3)
    guide_params = {"loc": jnp.zeros(2), "raw_scale": jnp.zeros(2)}
    state = tx.init(guide_params)
    for step in range(1, 6):
        gradient = {"loc": jnp.full(2, float(step)), "raw_scale": jnp.ones(2)}
        updates, state = tx.update(
            gradient, state, {**guide_params, "loc": jnp.full(2, -float(step))}
        )
        assert updates is gradient
    np.testing.assert_array_equal(state.traced_gradients[:, 0], [4, 5, 3])
    np.testing.assert_array_equal(state.traced_locations[:, 0], [-4, -5, -3])


def test_a_trace_that_is_not_full_or_not_there_is_refused():
    guide_params = {"loc": jnp.zeros(2), "raw_scale": jnp.zeros(2)}
    with pytest.raises(KeyError, match="trace_gradients"):
        noise_aware_posterior(guide_params, optax.sgd(1.0).init(guide_params), num_examples=N)
    with pytest.raises(ValueError, match="keeps 5 steps, and 5 of them were not run"):
        noise_aware_posterior(guide_params, trace_gradients(5).init(guide_params), num_examples=N)
    with pytest.raises(ValueError, match="num_steps must be at least 2"):
        trace_gradients(1)
    with pytest.raises(ValueError, match=r"call tx\.update"):
        trace_gradients(2).update(guide_params, trace_gradients(2).init(guide_params))
