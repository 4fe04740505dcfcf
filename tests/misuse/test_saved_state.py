"""A state that is saved by any common means continues bit for bit, with keys of every type."""

import functools
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training import train_state as flax_train_state
from strategies import CORRELATED

import dpoptax
from dpoptax.random import key_data, wrap_key_data
from dpoptax.training import init_state, make_train_step

GAUSSIAN = dpoptax.mechanisms.Gaussian()
SAMPLER = dpoptax.samplers.Poisson(12, 6)
DATA = jax.random.normal(jax.random.key(1), (12, 3))
KEYS = {"threefry": jax.random.key, "chacha": dpoptax.random.insecure_key}
keys = pytest.mark.parametrize("make_key", KEYS.values(), ids=KEYS)


def transformation(key, mechanism=GAUSSIAN):
    private = dpoptax.privatize(1.0, 1.0, expected_batch_size=6, key=key, mechanism=mechanism)
    return optax.chain(private, optax.sgd(0.1, momentum=0.9))


def start(make_key, seed=0):
    """A state before the first step; another process makes one with another key."""
    found = dpoptax.random.split_by_purpose(make_key(seed))
    return init_state(
        {"w": jnp.zeros(3)}, tx=transformation(found.noise_key), sampler=SAMPLER,
        sampling_key=found.sampling_key, model_key=found.model_key,
    )  # fmt: skip


@functools.cache
def compiled_step():
    def loss_fn(params, example):
        return jnp.sum((params["w"] - example) ** 2)

    tx = transformation(jax.random.key(9))
    return jax.jit(make_train_step(loss_fn, tx=tx, sampler=SAMPLER))


def steps(state, count=2):
    for _ in range(count):
        state, _ = compiled_step()(state, DATA)
    return state


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, expected in zip(
        jax.tree.leaves(key_data(tree)), jax.tree.leaves(key_data(other)), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected)
        assert leaf.dtype == expected.dtype


def by_pickle(state, like, path):
    del like, path
    return pickle.loads(pickle.dumps(state))


def by_flax(state, like, path):
    del path
    stored = serialization.to_bytes(key_data(state))
    return wrap_key_data(serialization.from_bytes(key_data(like), stored), like)


def by_numpy(state, like, path):
    del path
    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves(key_data(state)))
    file.seek(0)
    with np.load(file) as arrays:
        leaves = [jnp.asarray(arrays[name]) for name in arrays.files]
    return wrap_key_data(jax.tree.unflatten(jax.tree.structure(like), leaves), like)


@jax.numpy_dtype_promotion("standard")  # Orbax mixes types
def by_orbax(state, like, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", like)


WAYS = {"pickle": by_pickle, "flax": by_flax, "numpy": by_numpy, "orbax": by_orbax}


@pytest.mark.slow
@keys
@pytest.mark.parametrize("way", WAYS)
def test_a_train_state_continues_bit_for_bit(make_key, way, tmp_path):
    state = steps(start(make_key))
    restored = WAYS[way](state, start(make_key, seed=1), tmp_path)
    assert_equal(restored, state)
    assert_equal(steps(restored), steps(state))


@keys
@pytest.mark.parametrize("way", WAYS)
def test_states_of_a_loop_of_your_own_survive(make_key, way, tmp_path):
    """A `PrivatizeState`, an Optax state, and a `TrainState` of Flax."""
    params = {"w": jnp.zeros(3)}

    def states(seed):
        tx = transformation(make_key(seed))
        return {
            "privatize": tx.init(params)[0],
            "flax": flax_train_state.TrainState.create(
                apply_fn=None, params=params, tx=transformation(make_key(seed + 2))
            ).opt_state,
            "sampler": SAMPLER.init(make_key(seed + 4)),
            **{
                f"correlated, {name}": transformation(make_key(seed + 6), make()).init(params)
                for name, make in CORRELATED.items()
            },
        }

    before = states(0)
    assert_equal(WAYS[way](before, states(1), tmp_path), before)


def test_these_tests_have_power():
    """A state that lost its keys continues with other noise."""
    state = steps(start(jax.random.key))
    lost = start(jax.random.key, seed=1)._replace(step=state.step, params=state.params)
    assert not np.allclose(steps(lost).params["w"], steps(state).params["w"])


def test_a_key_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"expected \(2,\) words.*'a'.*threefry.*got \(8,\)"):
        wrap_key_data(key_data({"a": dpoptax.random.insecure_key(0)}), {"a": jax.random.key(0)})


def test_every_key_type_has_a_name_that_makes_it_again():
    for key in [dpoptax.random.insecure_key(0, rounds=rounds) for rounds in (8, 12, 20)]:
        name = str(jax.random.key_impl(key))
        again = jax.random.wrap_key_data(jax.random.key_data(key), impl=name)
        assert again.dtype == key.dtype
