"""What every mechanism must do: add the noise that is accounted, and never the same noise twice."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

import dpoptax

every_mechanism = pytest.mark.parametrize(
    "make", registry.MECHANISMS.values(), ids=registry.MECHANISMS
)
SIZE = 4000
PARAMS = {"a": jnp.zeros(SIZE // 2), "b": jnp.zeros((SIZE // 4, 2))}


def releases(mechanism, seed, num_steps, gradient=0.0):
    """Returns the noisy sums of some steps, one row per step."""
    tx = dpoptax.privatize(
        2.0, 1.5, expected_batch_size=1, key=jax.random.key(seed), mechanism=mechanism
    )
    grads = jax.tree.map(lambda leaf: jnp.full((1, *leaf.shape), gradient), PARAMS)
    update, state, rows = jax.jit(tx.update), tx.init(PARAMS), []
    for _ in range(num_steps):
        updates, state = update(grads, state, PARAMS)
        rows.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)]))
    return np.stack(rows)


@every_mechanism
def test_noise_is_the_noise_multiplier_times_the_clip_bound(make):
    noise = releases(make(), 0, 3)
    assert abs(noise.std() / 3.0 - 1) < 4.5 / math.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 4.5 * 3.0 / math.sqrt(noise.size)


@every_mechanism
def test_noise_is_added_to_the_clipped_sum(make):
    noisy = releases(make(), 0, 3, gradient=1e3)
    clipped = 2.0 / math.sqrt(SIZE)  # a constant gradient of norm 2
    assert abs(noisy.mean() - clipped) < 4.5 * 3.0 / math.sqrt(noisy.size)


@every_mechanism
def test_no_two_steps_or_keys_share_noise_and_one_key_repeats_it(make):
    rows, others = releases(make(), 0, 3), releases(make(), 1, 3)
    np.testing.assert_array_equal(rows, releases(make(), 0, 3))
    correlations = np.corrcoef(np.concatenate([rows, others]))[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 5.5 / math.sqrt(SIZE)


@every_mechanism
def test_a_plan_accepts_it_and_accounts_for_gaussian_noise(make):
    fields = {
        "sampler": dpoptax.samplers.Poisson(1000, 20),
        "clip": 1.0,
        "noise_multiplier": 1.1,
        "num_steps": 10,
        "delta": 1e-5,
    }
    plan = dpoptax.Plan(**fields, mechanism=make())
    assert plan.epsilon() == dpoptax.Plan(**fields).epsilon()


@pytest.mark.parametrize(
    "stateful", registry.MECHANISMS_WITH_STATE.values(), ids=registry.MECHANISMS_WITH_STATE
)
def test_laws_3_to_7_of_a_mechanism_with_state(stateful):
    """In a later step, with the noise of that step taken off."""
    tx = dpoptax.privatize(
        2.0, 1.5, expected_batch_size=4, key=jax.random.key(0), mechanism=stateful()
    )
    params, grads_fn = jnp.zeros(50), dpoptax.per_example_grads(jnp.vdot)

    @jax.jit
    def step(state, examples, mask):
        return tx.update(grads_fn(params, examples, mask=mask), state, params)

    examples = jnp.linspace(0.01, 1.0, 6)[:, None] * jax.random.normal(jax.random.key(1), (6, 50))
    everybody, nobody = jnp.ones(6, bool), jnp.zeros(6, bool)
    state = tx.init(params)
    for _ in range(2):
        _, state = step(state, examples, everybody)
    noise, _ = step(state, examples, nobody)
    expected = stateful().noise_scales()[2] * 2.0 * 1.5 / 4
    assert abs(float(noise.std()) / expected - 1) < 4.5 / math.sqrt(2 * 50)

    def released_sum(examples, mask):
        return np.asarray(4 * (step(state, examples, mask)[0] - noise))

    norms = jnp.linalg.norm(examples, axis=1, keepdims=True)
    clipped = examples * jnp.minimum(1.0, 2.0 / norms)
    np.testing.assert_allclose(released_sum(examples, everybody), clipped.sum(axis=0), atol=1e-4)
    some = everybody.at[2].set(False)
    for hostile in (jnp.nan, jnp.inf, 1e30):
        filled = examples.at[2].set(hostile)
        found = released_sum(filled, some)
        np.testing.assert_allclose(found, clipped.sum(axis=0) - clipped[2], atol=1e-4)
        if not np.isfinite(hostile):
            np.testing.assert_allclose(released_sum(filled, everybody), found, atol=1e-4)
    moved = released_sum(1e6 * examples, everybody) - released_sum(1e6 * examples, some)
    assert np.linalg.norm(moved) == pytest.approx(2.0, rel=1e-4)
