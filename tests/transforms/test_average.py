"""Averages of parameters match their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.training import PrivateRun, fit
from dpoptax.transforms import average_params, averaged_params

PARAMS = {"a": jnp.array([0.3, -1.0]), "b": jnp.array([-2.0, 1.0])}


def iterates_and_average(average, num=8, params=PARAMS):
    tx = optax.chain(optax.sgd(0.5), average)
    state, iterates = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(num):
        gradient = jax.tree.map(lambda leaf, at=step: jnp.cos(leaf * at), params)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        iterates.append(params)
    return iterates, averaged_params(state)


def check(average, iterates, weights, rtol=1e-5):
    expected = jax.tree.map(
        lambda *rows: np.average(np.stack(rows).astype(np.float64), 0, weights), *iterates
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), average, expected)


@pytest.mark.parametrize("start", [0, 3, 100])
def test_the_mean_is_that_of_the_iterates_from_the_start_on(start):
    iterates, average = iterates_and_average(average_params(start=start))
    weights = np.arange(8) >= start if start < 8 else np.arange(8) == 7
    check(average, iterates, weights)


@pytest.mark.parametrize(("decay", "start"), [(0.0, 0), (0.6, 0), (0.9999, 0), (0.6, 3)])
def test_the_exponential_average_has_no_bias_from_its_start(decay, start):
    iterates, average = iterates_and_average(average_params(decay=decay, start=start))
    ages = np.arange(7, -1, -1)
    weights = np.where(np.arange(8) >= start, np.float64(decay) ** ages, 0)
    check(average, iterates, weights)


def test_the_average_of_narrow_parameters_is_wide():
    """In bfloat16 an average with a long memory would not move."""
    iterates, average = iterates_and_average(
        average_params(decay=0.999), params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    )
    assert average["a"].dtype == jnp.float32
    # XLA may leave out the rounding of each iterate to bfloat16.
    check(average, iterates, 0.999 ** np.arange(7, -1, -1), rtol=5e-3)


@pytest.mark.seconds
def test_results_of_training_have_the_average():
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(40, 8), clip=1.0, noise_multiplier=1.0, num_steps=4,
        delta=1e-3,
    )  # fmt: skip
    loss = lambda mean, x: 0.5 * jnp.sum((mean - x).astype(jnp.float32) ** 2)  # noqa: E731
    options = {"plan": plan, "key": jax.random.key(0)}
    start, data = jnp.zeros(2, jnp.bfloat16), jnp.ones((40, 2), jnp.bfloat16)
    averaging = optax.chain(optax.sgd(0.1), average_params())
    run = PrivateRun(loss, start, data, optimizer=averaging, **options)
    iterates = [run.params for _ in run]
    result = fit(loss, start, data, optimizer=averaging, progress=False, **options)
    for found in (run, result):
        assert found.averaged_params.dtype == jnp.bfloat16
        mean = np.mean(np.stack(iterates).astype(np.float32), 0)
        np.testing.assert_allclose(found.averaged_params.astype(np.float32), mean, rtol=1e-2)


@pytest.mark.slow
def test_an_average_cuts_the_noise_of_private_iterates():
    tx = optax.chain(
        dpoptax.privatize(1.0, 1.0, expected_batch_size=10, key=jax.random.key(0)), optax.sgd(0.3),
        average_params(start=50),
    )  # fmt: skip
    params = jnp.zeros(500)

    def step(carry, _):
        params, state = carry
        # The gradient of a bowl around zero, as ten equal examples; the noise is of order 0.1.
        updates, state = tx.update(jnp.broadcast_to(params, (10, 500)), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=400)
    assert float(averaged_params(state).std()) < 0.5 * float(params.std())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="start must be at least 0"):
        average_params(start=-1)
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        average_params(decay=1.0)
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        average_params().update(PARAMS, average_params().init(PARAMS))
    with pytest.raises(KeyError, match="average_params"):
        averaged_params(optax.sgd(1.0).init(PARAMS))
