"""The noise of a release: its scale, its distribution, and that it is centred on the sum."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import dpoptax

N = 20_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("l2_clip", "noise_multiplier"), [(1.0, 1.0), (0.1, 3.0), (10.0, 0.5)])
def test_a_release_is_the_sum_plus_noise_of_the_stated_scale(l2_clip, noise_multiplier, seed):
    """z = (release - sum) / (noise_multiplier * l2_clip) is standard normal, for 0 and 1 example.

    With half the noise, twice the clip or a forgotten division the variance is off by a factor of
    two or more; the test allows 4.5 standard errors, which is 4.5 %.
    """
    expected_batch_size = 37
    params = {"a": jnp.zeros(N // 2), "b": jnp.zeros((N // 200, 100))}
    direction = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1 / math.sqrt(N)), params)
    for present in (0.0, 1.0):
        tx = dpoptax.privatize(
            l2_clip,
            noise_multiplier,
            expected_batch_size=expected_batch_size,
            key=jax.random.key(seed + 10 * int(present)),
        )
        grads = jax.tree.map(
            lambda leaf, here=present: 1e3 * l2_clip * here * leaf[None], direction
        )
        updates, _ = tx.update(grads, tx.init(params), params)
        release = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)])
        z = release * expected_batch_size / (noise_multiplier * l2_clip)
        z = z - present / (noise_multiplier * math.sqrt(N))
        assert abs(z.mean()) < 4.5 / math.sqrt(N)
        assert abs(z.var() - 1) < 4.5 * math.sqrt(2 / N)
        assert scipy.stats.kstest(z, "norm").pvalue > 1e-4


def test_along_the_gradient_of_one_example_the_release_moves_by_one_over_the_noise_multiplier():
    """The two worlds that accounting compares: N(0, 1) without the example, N(1/sigma, 1) with."""
    noise_multiplier, dimension = 2.0, 16
    params = jnp.zeros(dimension)
    gradient = jnp.full((1, dimension), 100.0)
    direction = jnp.full(dimension, 1 / math.sqrt(dimension))

    def project(present, seed):
        key = jax.random.key(seed)
        tx = dpoptax.privatize(1.0, noise_multiplier, expected_batch_size=8, key=key)

        def step(state, _):
            updates, state = tx.update(present * gradient, state, params)
            return state, jnp.vdot(updates, direction) * 8 / noise_multiplier

        return np.asarray(jax.lax.scan(step, tx.init(params), None, length=N)[1])

    without, with_it = project(0.0, seed=3), project(1.0, seed=4)
    for z, mean in ((without, 0.0), (with_it, 1 / noise_multiplier)):
        assert abs(z.mean() - mean) < 4.5 / math.sqrt(N)
        assert abs(z.var() - 1) < 4.5 * math.sqrt(2 / N)


@pytest.mark.slow
def test_float64_parameters_get_float64_noise():
    with jax.enable_x64(True):
        params = jnp.zeros(1000, jnp.float64)
        tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=1, key=jax.random.key(0))
        updates, _ = tx.update(jnp.zeros((1, 1000), jnp.float64), tx.init(params), params)
        assert updates.dtype == jnp.float64
        assert not np.array_equal(updates, np.asarray(updates, np.float32))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program of a CPU")
def test_a_program_draws_once_even_if_the_optimizer_uses_the_release_twice():
    """Without the complex division at the end, XLA repeats the draw for each moment of Adam."""
    params, shifts = jnp.zeros((300, 200)), {}
    for optimizer in (optax.sgd(0.1), optax.adam(0.1)):
        tx = optax.chain(
            dpoptax.privatize(1.0, 1.0, expected_batch_size=100, key=jax.random.key(0)), optimizer
        )
        with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes integers and floats
            step = jax.jit(tx.update).lower(params[None], tx.init(params), params).compile()
        shifts[optimizer] = step.as_text().count(" shift-right-logical(")
    once, twice = shifts.values()
    assert once == twice >= 20, "Threefry rotates twenty times"
