"""Correlated noise: its covariance is that of the matrix, and no draw is used elsewhere."""

import contextlib

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from strategies import CORRELATED, Recursion, Taps, recorded, rows_of, whitened

import dpoptax
from dpoptax import mechanisms
from dpoptax.mechanisms import _correlated
from dpoptax.mechanisms._state import NoiseKeys, PastKeys
from dpoptax.schedules import Schedule

every = pytest.mark.parametrize("make", CORRELATED.values(), ids=CORRELATED)
# The second one in the slow tests only.
taps_first = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=() if name == "taps" else pytest.mark.slow)
        for name, make in CORRELATED.items()
    ],
)
PARAMS = {"a": jnp.zeros(500), "b": jnp.zeros((2, 3))}
ZEROS = jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape)), PARAMS)


def assert_white(rows):
    """The rows are independent normal draws with standard deviation one."""
    covariance = rows @ rows.T / rows.shape[1]
    # The largest of about a hundred entries, each with a standard error of at most sqrt(2 / n).
    assert np.abs(covariance - np.eye(len(rows))).max() < 5 * np.sqrt(2 / rows.shape[1])


@pytest.mark.seconds
@every
def test_the_covariance_of_a_run_is_that_of_the_matrix(make):
    mechanism = make()
    rows = recorded(mechanism)
    assert_white(whitened(mechanism, rows))
    # The rows are not white themselves: the noise of a step takes back a part of the last one.
    assert np.corrcoef(rows[:2])[0, 1] < -0.2


def shifted(function):
    def add_filtered(key_of, taps, count, *rest, **options):
        return function(key_of, taps, count)(*rest, **options)

    return {"add_filtered": add_filtered}


def with_arguments(key_of, taps, count):
    return lambda *rest, **options: ADD(key_of, taps, count, *rest, **options)


ADD = _correlated.add_filtered
WRONG = {
    "taps start one step too early": shifted(
        lambda key_of, taps, count: with_arguments(key_of, (taps[0], *taps[2:], 0.0), count)
    ),
    "keys of one step earlier": shifted(
        lambda key_of, taps, count: with_arguments(
            lambda age: key_of(jnp.maximum(age, jnp.minimum(age + 1, 2))), taps, count
        )
    ),
    "taps in the wrong order": shifted(
        lambda key_of, taps, count: with_arguments(key_of, taps[::-1], count)
    ),
    "one tap too few": shifted(
        lambda key_of, taps, count: with_arguments(key_of, taps, jnp.maximum(count - 1, 1))
    ),
    "draws before the first step": shifted(
        lambda key_of, taps, count: with_arguments(key_of, taps, len(taps))
    ),
    "a ring that turns": {"PastKeys": lambda keys: PastKeys(jnp.roll(keys, 1))},
    "a ring that stands still": {
        "PastKeys": lambda keys: PastKeys(jnp.concatenate([keys[:1], keys[:1], keys[:1]]))
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_tap_or_key_is_found(wrong, monkeypatch):
    for name, patch in WRONG[wrong].items():
        monkeypatch.setattr(_correlated, name, patch)
    mechanism = CORRELATED["taps"]()
    with pytest.raises(AssertionError):
        assert_white(whitened(mechanism, recorded(mechanism)))


@pytest.mark.seconds
@taps_first
def test_law_8_runs_and_leaves_share_no_draw(make):
    """Also leaves of one shape, and runs whose keys are next to each other."""
    mechanism = make()
    params = {name: jnp.zeros(600) for name in "ab"} | {"c": jnp.zeros((2, 600))}
    rows = [
        whitened(mechanism, recorded(mechanism, steps=5, seed=seed, params=params))
        for seed in range(2)
    ]
    assert_white(np.concatenate(rows).reshape(2 * 5 * 4, 600))


def transformation(mechanism, key=0, clip=2.0, noise_multiplier=1.5, **options):
    return dpoptax.privatize(
        clip,
        noise_multiplier,
        expected_batch_size=1,
        key=jax.random.key(key),
        mechanism=mechanism,
        **options,
    )


def run(tx, state, steps, update=None):
    update, rows = update or jax.jit(tx.update), []
    for _ in range(steps):
        noise, state = update(ZEROS, state, PARAMS)
        rows.append(rows_of(noise))
    return state, np.stack(rows)


@pytest.mark.seconds
@taps_first
def test_a_plain_loop_a_scan_and_eager_steps_release_the_same(make):
    tx = transformation(make())
    state, rows = run(tx, tx.init(PARAMS), 6)
    assert int(state.step) == 6
    covariance = whitened(make(), rows)
    assert np.abs(np.corrcoef(covariance) - np.eye(6)).max() < 5 / np.sqrt(500)

    again = transformation(make())
    _, found = jax.jit(
        lambda state: jax.lax.scan(
            lambda s, _: again.update(ZEROS, s, PARAMS)[::-1], state, length=6
        )
    )(again.init(PARAMS))
    scanned = np.stack([rows_of(jax.tree.map(lambda leaf, i=i: leaf[i], found)) for i in range(6)])
    np.testing.assert_allclose(scanned, rows, rtol=1e-4, atol=1e-4)

    eager = transformation(make())
    _, found = run(eager, eager.init(PARAMS), 2, eager.update)
    np.testing.assert_allclose(found, rows[:2], rtol=1e-4, atol=1e-4)


@taps_first
def test_without_noise_it_releases_the_sum(make):
    tx = transformation(make(), noise_multiplier=0.0)
    state, rows = run(tx, tx.init(PARAMS), 2)
    assert not rows.any()
    assert int(state.step) == 2


OPTIONS = {
    "one tap": (Taps((1.0,)), {}),
    "one band": (Recursion((1.0,)), {}),
    "taps, three draws": (Taps((1.0, -0.5)), {"num_draws": 3}),
    "recursion, draws of JAX": (Recursion((1.0, 0.5)), {"jax_random": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "options"), OPTIONS.values(), ids=OPTIONS)
def test_one_band_is_independent_noise_and_options_are_those_of_the_gaussian(strategy, options):
    mechanism = mechanisms.Correlated(strategy, **options)
    tx = transformation(mechanism)
    _, rows = run(tx, tx.init(PARAMS), 3)
    assert_white(whitened(mechanism, rows))


@pytest.mark.seconds
@taps_first
@pytest.mark.parametrize("change", ["clip", "noise", "strategy", "size", "other mechanism"])
def test_a_state_in_a_changed_transformation_is_refused_or_releases_nan(make, change):
    mechanism = make()
    tx = transformation(mechanism)
    state, _ = run(tx, tx.init(PARAMS), 2)
    numbers = (*mechanism.strategy.numbers[:-1], 0.1)
    changed = {
        "clip": transformation(mechanism, clip=1.0),
        "noise": transformation(mechanism, noise_multiplier=1.0),
        "strategy": transformation(
            attrs.evolve(mechanism, strategy=attrs.evolve(mechanism.strategy, numbers=numbers))
        ),
        "size": dpoptax.privatize(
            2.0, 1.5, expected_batch_size=2, key=jax.random.key(0), mechanism=mechanism
        ),
        "other mechanism": transformation(mechanisms.Gaussian()),
    }[change]
    with pytest.raises(ValueError, match=r"expected (the|a) state of .*start a new run"):
        changed.update(ZEROS, state, PARAMS)
    outcome = contextlib.nullcontext()
    if change == "other mechanism":  # which shows in the structure
        outcome = pytest.raises(ValueError, match="expected a state of the mechanism Gaussian")
    with outcome:
        noise, _ = jax.jit(changed.update)(ZEROS, state, PARAMS)
        assert np.isnan(rows_of(noise)).all()


def test_a_state_of_another_structure_is_refused_by_name():
    states = [transformation(make()).init(PARAMS) for make in CORRELATED.values()]
    states.append(transformation(mechanisms.Gaussian()).init(PARAMS))
    states.append(transformation(mechanisms.Correlated(Taps((1.0, -0.5)))).init(PARAMS))
    tx = transformation(CORRELATED["taps"]())
    for state in states[1:]:
        with pytest.raises(ValueError, match="expected a state of the mechanism Correlated"):
            jax.jit(tx.update)(ZEROS, state, PARAMS)
    other = {"a": jnp.zeros(500), "b": jnp.zeros((3, 2))}
    tx = transformation(CORRELATED["recursion"]())
    with pytest.raises(ValueError, match="other parameters"):
        tx.update(ZEROS, tx.init(other), PARAMS)


@taps_first
def test_no_step_after_the_last_has_noise(make):
    mechanism = attrs.evolve(make(), strategy=attrs.evolve(make().strategy, num_steps=3))
    tx = transformation(mechanism)
    update = jax.jit(tx.update)
    state, rows = run(tx, tx.init(PARAMS), 3, update)
    assert np.isfinite(rows).all()
    state, rows = run(tx, state, 2, update)
    assert np.isnan(rows).all()
    state = state._replace(step=jnp.asarray(3, jnp.int32))
    with pytest.raises(ValueError, match=r"at most 3 steps.*got step number 4.*more steps"):
        tx.update(ZEROS, state, PARAMS)


@every
def test_the_state_is_not_shown(make):
    tx = transformation(make())
    state = tx.init(PARAMS)
    text = "PrivatizeState(step=0, key=<not shown>, mechanism_state=<not shown>)"
    assert repr(state) == text
    assert repr((state,)) == f"({text},)"
    assert repr(state.mechanism_state) == "MechanismState(<not shown>)"
    keys = NoiseKeys(state.key, state.key, "identity")
    assert "Array" not in repr(keys)
    for leaf in jax.tree.leaves(state.mechanism_state):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert leaf.dtype in (jnp.float32, jnp.uint32)


def test_the_state_of_narrow_parameters_is_wide_and_noise_is_added_in_float32():
    params = {"w": jnp.zeros(3, jnp.bfloat16)}
    for make in CORRELATED.values():
        tx = transformation(make())
        state = tx.init(params)
        noise, state = jax.jit(tx.update)({"w": jnp.zeros((2, 3), jnp.bfloat16)}, state, params)
        assert noise["w"].dtype == jnp.bfloat16
        inner = jax.tree.leaves(state.mechanism_state.inner)
        assert all(leaf.dtype != jnp.bfloat16 for leaf in inner)


REFUSED = {
    "schedule of the clip": (
        {"clip": Schedule((1.0, 2.0), (3, 3))},
        "constant l2_clip.*schedule from 1.0 to 2.0",
    ),
    "schedule of the noise": (
        {"noise_multiplier": Schedule((1.0, 2.0), (3, 3))},
        "constant noise_multiplier.*schedule from 1.0 to 2.0",
    ),
    "rule with state": (
        {"clip": dpoptax.clipping.QuantileClip(1.0)},
        "QuantileClip changes.*Correlated needs a constant bound",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bound_or_noise_that_changes_is_refused_by_name(options, message):
    arguments = {"clip": 1.0, "noise_multiplier": 1.0} | options
    with pytest.raises((TypeError, ValueError), match=message):
        transformation(CORRELATED["taps"](), **arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        dpoptax.Plan(
            sampler=dpoptax.samplers.Shuffled(100, 10),
            num_steps=6,
            delta=1e-5,
            mechanism=CORRELATED["taps"](),
            **arguments,
        )


def test_a_schedule_of_one_value_and_of_the_batch_size_are_no_change():
    tx = dpoptax.privatize(
        Schedule((2.0,), (3,)),
        1.5,
        expected_batch_size=Schedule((1.0, 2.0), (1, 9)),
        key=jax.random.key(0),
        mechanism=CORRELATED["taps"](),
    )
    _, rows = run(tx, tx.init(PARAMS), 2)
    expected = 3 * CORRELATED["taps"]().strategy.noise_norms()[:2] / [1, 2]
    np.testing.assert_allclose(rows.std(axis=1), expected, rtol=0.2)


def test_the_strategy_must_be_one():
    with pytest.raises(TypeError, match="strategy"):
        mechanisms.Correlated(mechanisms.Gaussian())
    with pytest.raises(TypeError, match="strategy"):
        mechanisms.Correlated(strategies.Taps)


@pytest.mark.parametrize(
    "strategy",
    [
        mechanisms.strategies.BandedToeplitz((1.0, 2.0), 40),
        mechanisms.strategies.BandedToeplitz((1.0, 2.0), 2000),
        mechanisms.strategies.BandedInverse((1.0, 1e9), 2),
        mechanisms.strategies.DenseStrategy([[1.0, 0.0], [1e12, 1.0]]),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_noise_whose_new_draws_are_lost_to_rounding_is_refused(strategy):
    # Else a step would have no noise of its own: old noise plus a draw would round to old noise.
    with pytest.raises(ValueError, match="rounding would replace the draw"):
        mechanisms.Correlated(strategy)
    mechanisms.Correlated(mechanisms.strategies.BandedToeplitz((1.0,) * 8, 2000))


@pytest.mark.slow
@every
def test_an_ensemble_of_members_has_independent_noise(make):
    txs = [transformation(make(), key=key) for key in range(2)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[tx.init(PARAMS) for tx in txs])
    update, rows = jax.jit(jax.vmap(txs[0].update, (None, 0, None))), []
    for _ in range(3):
        noise, states = update(ZEROS, states, PARAMS)
        rows.append(np.asarray(noise["a"], np.float64))
    members = [whitened(make(), np.stack(rows)[:, member]) for member in range(2)]
    assert_white(np.concatenate(members))


@pytest.mark.seconds
def test_memory_is_a_few_draws_and_no_copy_of_the_parameters():
    size, taps = 1 << 18, tuple(1 / (2.0**j) for j in range(8))
    params, grads = jnp.zeros(size), jnp.zeros((1, size))
    temporaries = {}
    for name, mechanism in {
        "independent": mechanisms.Gaussian(),
        "correlated": mechanisms.Correlated(Taps(taps)),
    }.items():
        tx = transformation(mechanism)
        state = tx.init(params)
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 100
        compiled = jax.jit(tx.update).lower(grads, state, params).compile()
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries["correlated"] <= temporaries["independent"] + 2.1 * 4 * size
