"""Misuse: a state that is used twice. The difference of its two releases has no noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax

PARAMS = jnp.zeros(3)
GRADS = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
OTHER = GRADS.at[1].set(0.0)
USED = "got a state that was used already, with other gradients.*Keep the new state"
CONSTANT = "got a state that is a constant in it.*Pass the state in"


def private(noise_multiplier=1.0, seed=0):
    return dpoptax.privatize(1.0, noise_multiplier, expected_batch_size=2, key=jax.random.key(seed))


def test_other_gradients_from_one_state_are_refused():
    tx = private()
    state = tx.init(PARAMS)
    release, following = tx.update(GRADS, state, PARAMS)
    with pytest.raises(ValueError, match=USED):
        tx.update(OTHER, state, PARAMS)
    # The same again is no second release.
    np.testing.assert_array_equal(tx.update(GRADS, state, PARAMS)[0], release)
    # The run itself continues, and its earlier states stay used.
    tx.update(OTHER, following, PARAMS)
    for used in (state, following):
        with pytest.raises(ValueError, match=USED):
            tx.update(-GRADS, used, PARAMS)
    # The same run from its start, as after a failure.
    again = private()
    np.testing.assert_array_equal(again.update(GRADS, again.init(PARAMS), PARAMS)[0], release)


def test_a_loop_that_drops_the_new_state_is_refused_in_its_second_step():
    tx = optax.chain(private(), optax.sgd(0.1))
    state = tx.init(PARAMS)

    def step(params, number):
        updates, _ = tx.update(GRADS + number, state, params)
        return optax.apply_updates(params, updates)

    params = step(PARAMS, 0)
    with pytest.raises(ValueError, match=USED):
        step(params, 1)


def test_what_a_refusal_prevents():
    """Under jit nobody sees it: the difference is that of the clipped sums, to the last bit."""
    tx = private(noise_multiplier=1e3)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    difference = update(GRADS, state, PARAMS)[0] - update(OTHER, state, PARAMS)[0]
    np.testing.assert_allclose(difference, [0.0, 0.5, 0.0], atol=1e-3)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.eval_shape], ids=lambda f: f.__name__)
def test_a_state_that_a_compiled_function_captures_is_refused(transform):
    tx = private()
    state = tx.init(PARAMS)
    step = lambda grads: tx.update(grads, state, PARAMS)[0]  # noqa: E731
    if transform is jax.eval_shape:
        step = functools.partial(transform, step)
    elif transform is jax.vmap:
        step = jax.vmap(step)
    else:
        step = transform(step)
    grads = jnp.stack([GRADS, OTHER]) if transform is jax.vmap else GRADS
    with pytest.raises(ValueError, match=CONSTANT):
        step(grads)
    # As an argument it is right, and the refused trace did not use the state.
    jax.jit(tx.update)(GRADS, state, PARAMS)


def test_a_scan_that_captures_the_state_is_refused():
    tx = private()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=CONSTANT):
        jax.lax.scan(
            lambda params, grads: (params + tx.update(grads, state, PARAMS)[0], None),
            PARAMS,
            jnp.stack([GRADS, OTHER]),
        )


def test_one_init_for_all_members_of_an_ensemble_is_refused():
    tx = private()
    with pytest.raises(ValueError, match=r"got jax.vmap of init.*a key of its own"):
        jax.vmap(tx.init)(jnp.zeros((4, 3)))
    # A transformation that is made from a key of the member is right.
    keys = jax.random.split(jax.random.key(0), 4)
    states = jax.vmap(
        lambda key, params: dpoptax.privatize(1.0, 1.0, expected_batch_size=2, key=key).init(params)
    )(keys, jnp.zeros((4, 3)))
    assert len(np.unique(jax.random.key_data(states.key), axis=0)) == 4


def test_without_noise_a_state_may_be_used_again():
    tx = private(noise_multiplier=0.0)
    state = tx.init(PARAMS)
    releases = [tx.update(grads, state, PARAMS)[0] for grads in (GRADS, OTHER)]
    assert np.any(releases[0] != releases[1])
    jax.jit(lambda grads: tx.update(grads, state, PARAMS))(GRADS)
