"""One key for two runs: runs that differ in anything draw other noise, and equal runs are equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.training import DeviceData, HostData, PrivateRun, fit, init_state, make_train_step
from dpoptax.training import _noise_binding as binding
from dpoptax.training._program_digest import ProgramDigest

WIDTH = 256
PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(12, 12), clip=1e-3, noise_multiplier=1.0, num_steps=2,
    delta=1e-3,
)  # fmt: skip
KEY = jax.random.key(0)
PARAMS = jnp.zeros(WIDTH)
DATA = np.asarray(jax.random.normal(jax.random.key(1), (12, WIDTH)))
OTHER = DATA.copy()
OTHER[3, 5] += np.float32(1e-3)  # one number of one example


def loss_fn(params, example):
    return jnp.sum((params - example) ** 2)


def other_loss(params, example):
    return 1.5 * loss_fn(params, example)


def release(loss=loss_fn, params=PARAMS, data=DATA, rate=1.0, **changes):
    """What two steps add to the parameters, in units of the learning rate: nearly only noise."""
    arguments = {"plan": PLAN, "optimizer": optax.sgd(rate), "key": KEY, "progress": False}
    result = fit(loss, params, data, **(arguments | changes))
    return np.asarray(result.params - params) / rate


def assert_other_noise(first, second):
    # The clip is a thousandth of the noise's scale relative to WIDTH coordinates, so equal noise
    # would correlate by nearly one.
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / np.sqrt(WIDTH)


CHANGES = {
    "loss": {"loss": other_loss},
    "learning rate": {"rate": 2.0},
    "data": {"data": OTHER},
    "host data": {"data": HostData(OTHER)},
    "parameters": {"params": PARAMS + 1.0},
}


@functools.cache
def release_of_base():
    return release()


@pytest.fixture
def base():
    """Of the first test that asks: a fixture of the module would not see how tests compile."""
    return release_of_base()


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_differs_in_one_thing_draws_other_noise(change, base):
    assert_other_noise(base, release(**CHANGES[change]))


@pytest.mark.slow
def test_equal_runs_are_equal_whatever_objects_they_are_made_of(base):
    again = release(loss=lambda params, example: loss_fn(params, example))
    np.testing.assert_array_equal(again, base)
    np.testing.assert_array_equal(release(data=DeviceData(DATA)), base)
    np.testing.assert_array_equal(release(data=HostData(DATA)), base)
    # More planned steps continue the same run.
    part = release(plan=PLAN.replace(num_steps=1))
    assert np.corrcoef(part, base)[0, 1] > 0.5


def test_the_layout_of_a_run_changes_no_noise(base):
    np.testing.assert_allclose(release(microbatch_size=4), base, rtol=1e-5, atol=1e-7)


def test_these_tests_have_power(monkeypatch):
    """Without the binding, a sweep with one key shares all noise."""
    monkeypatch.setattr(binding, "bind_key", lambda key, values, program, mask=None: key)
    first, second = release(), release(rate=2.0)
    assert np.corrcoef(first, second)[0, 1] > 0.99


def captured(factor):
    return lambda params, example: factor * loss_fn(params, example)


FACTORS = {
    "array": lambda value: jnp.full(3, value).sum(),
    "number": lambda value: value,
    "numpy": lambda value: np.float32(value),
}


@pytest.mark.parametrize("kind", FACTORS)
def test_the_program_digest_sees_what_a_loss_captures(kind):
    tx = dpoptax.dp_sgd(0.1, 1.0, noise_multiplier=1.0, expected_batch_size=1, key=KEY)
    params, examples = jnp.zeros(2), jnp.zeros((1, 2))
    opt_state = jax.eval_shape(tx.init, params)

    def digest(loss):
        return ProgramDigest(loss, tx)(params, examples, None, params, opt_state)[0]

    make = FACTORS[kind]
    assert digest(captured(make(2.0))) == digest(captured(make(2.0)))
    assert digest(captured(make(2.0))) != digest(captured(make(2.5)))


def test_the_program_digest_sees_the_backward_pass_and_distrusts_callbacks():
    tx = dpoptax.dp_sgd(0.1, 1.0, noise_multiplier=1.0, expected_batch_size=1, key=KEY)
    params, examples = jnp.zeros(2), jnp.zeros((1, 2))
    opt_state = jax.eval_shape(tx.init, params)

    def digest(loss):
        return ProgramDigest(loss, tx)(params, examples, None, params, opt_state)[0]

    def straight_through(scale):
        @jax.custom_vjp
        def forward(x):
            return jnp.sum(x)

        forward.defvjp(
            lambda x: (jnp.sum(x), None), lambda _, g: (jnp.full(2, scale * g, jnp.float32),)
        )
        return lambda params, example: forward(params + example)

    assert digest(straight_through(1.0)) == digest(straight_through(1.0))
    assert digest(straight_through(1.0)) != digest(straight_through(2.0))

    def with_callback(params, example):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        number = jax.pure_callback(lambda: np.float32(1.0), shape)
        return jax.lax.stop_gradient(number) * loss_fn(params, example)

    assert digest(with_callback) != digest(with_callback)

    def printing(params, example):
        jax.debug.callback(lambda: None)
        return loss_fn(params, example)

    assert digest(printing) == digest(printing)


def loop_state(step, state, data, num_steps=2):
    for _ in range(num_steps):
        state, _ = step(state, data)
    return np.asarray(state.params)


def test_a_step_in_a_loop_binds_its_noise_too():
    keys = dpoptax.random.split_by_purpose(KEY)

    def run(loss=loss_fn, params=PARAMS, data=DATA, rate=1.0):
        tx = optax.chain(PLAN.privatize(keys.noise_key), optax.sgd(rate))
        state = init_state(
            params, tx=tx, sampler=PLAN.sampler, sampling_key=keys[0], model_key=keys[2]
        )
        step = jax.jit(make_train_step(loss, tx=tx, sampler=PLAN.sampler))
        return (loop_state(step, state, data) - np.asarray(params)) / rate

    first = run()
    np.testing.assert_array_equal(run(), first)
    for changes in ({"loss": other_loss}, {"data": OTHER}):
        assert_other_noise(first, run(**changes))


@pytest.mark.slow
def test_a_captured_traced_number_is_bound_by_its_value():
    """A sweep by `jax.vmap`: the learning rate is known only when the program runs."""
    keys = dpoptax.random.split_by_purpose(KEY)

    def run(rate):
        tx = optax.chain(PLAN.privatize(keys.noise_key), optax.scale(-rate))
        state = init_state(
            PARAMS, tx=tx, sampler=PLAN.sampler, sampling_key=keys[0], model_key=keys[2]
        )
        step = make_train_step(loss_fn, tx=tx, sampler=PLAN.sampler)
        return step(state, jnp.asarray(DATA))[0].params / rate

    first, second, again = jax.vmap(run)(jnp.array([1.0, 2.0, 1.0]))
    assert_other_noise(first, second)
    np.testing.assert_array_equal(first, again)


LEAVES = {
    "float32": jnp.arange(4.0),
    "bfloat16": jnp.arange(4, dtype=jnp.bfloat16),
    "int32": jnp.arange(4),
    "uint8": jnp.arange(4, dtype=jnp.uint8),
    "int4": jnp.arange(4, dtype=jnp.int4),
    "bool": jnp.array([True, False, True, False]),
    "complex64": jnp.arange(4).astype(jnp.complex64),
}


def _digest_in_numpy(leaves, seeds, mask):
    """Both words, one number of the leaves after the other."""
    word = 2**32

    def mix(x):
        for factor in (0x85EBCA6B, 0xC2B2AE35):
            x = (x ^ (x >> 16)) * factor % word
        return x ^ (x >> 16)

    first = second = 0
    for number, leaf in enumerate(leaves):
        bits = leaf.view(np.uint32) if leaf.dtype == np.float32 else leaf.astype(np.uint32)
        rows = np.broadcast_to(mask.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape)
        numbers = zip(bits.reshape(-1).tolist(), rows.reshape(-1).tolist(), strict=True)
        for index, (value, is_real) in enumerate(numbers):
            place = mix((number * 0x9E3779B9 + seeds[0] + index) % word)
            if is_real:
                first += mix(value ^ place)
                second += mix((value + place) * 0x9E3779B9 % word ^ seeds[1])
    return first % word, second % word


def test_both_words_of_the_digest_are_those_of_its_definition():
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=(5, 3)).astype(np.float32), rng.integers(0, 9, 5).astype(np.int32)]
    mask, seeds = np.array([True, True, False, True, True]), (123456789, 3000000000)
    words = binding.digest(leaves, jnp.array(seeds, jnp.uint32), jnp.array(mask))
    expected = _digest_in_numpy(leaves, seeds, mask)
    assert tuple(map(int, words)) == expected
    assert expected[0] != expected[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LEAVES)
def test_the_digest_sees_every_bit_and_every_place_and_no_padding(dtype):
    seeds = jnp.array([3, 4], jnp.uint32)
    leaf = LEAVES[dtype]

    def digest(leaf, mask=None):
        return tuple(map(int, binding.digest(leaf, seeds, mask)))

    found = [digest(leaf), digest(leaf[::-1]), digest(leaf.at[0].set(leaf[2] + leaf[1]))]
    assert len(set(found)) == (3 if dtype != "bool" else 2)
    padded = jnp.concatenate([leaf, leaf[:2]])
    mask = jnp.arange(6) < 4
    assert digest(padded, mask) == digest(leaf, jnp.ones(4, bool)) == digest(leaf)
    assert digest((leaf, leaf)) != digest(leaf)


def test_negative_zero_and_nan_are_values_of_their_own():
    seeds = jnp.array([3, 4], jnp.uint32)
    values = [jnp.zeros(1), -jnp.zeros(1), jnp.full(1, jnp.nan), jnp.full(1, jnp.inf)]
    assert len({tuple(map(int, binding.digest(value, seeds))) for value in values}) == 4


def test_keys_in_the_data_are_bound():
    """Two runs that differ in a key have other gradients, so they need other noise."""

    def digest(seed):
        data = {"x": jnp.ones(3), "keys": jax.random.split(jax.random.key(seed), 3)}
        return tuple(map(int, binding.digest(data, jnp.array([1, 2], jnp.uint32))))

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)


def noise_key_after_a_step(loss, model_seed=0, **options):
    keys = dpoptax.random.split_by_purpose(KEY)
    tx = optax.chain(PLAN.privatize(keys.noise_key), optax.sgd(1.0))
    state = init_state(
        PARAMS,
        tx=tx,
        sampler=PLAN.sampler,
        sampling_key=keys.sampling_key,
        model_key=jax.random.key(model_seed),
    )
    step = make_train_step(loss, tx=tx, sampler=PLAN.sampler, **options)
    state, _ = jax.jit(step)(state, DATA)
    return jax.random.key_data(state.opt_state[0].key).tolist()


def test_the_key_of_the_loss_is_bound():
    def noise_key(model_seed):
        return noise_key_after_a_step(
            lambda params, example, key: jnp.sum(params) * jax.random.normal(key), model_seed
        )

    assert noise_key(0) == noise_key(0)
    assert noise_key(0) != noise_key(1)


@pytest.mark.slow
def test_rows_that_a_take_masks_are_bound():
    """The examples are the same, but other ones count, so the gradients differ."""

    def noise_key(num_rows):
        def take(data, batch):
            taken = dpoptax.samplers.take(data, batch)
            first = jnp.arange(len(batch.mask)) < num_rows
            return dpoptax.samplers.MaskedExamples(taken.examples, taken.mask & first)

        return noise_key_after_a_step(loss_fn, take=take)

    assert noise_key(6) == noise_key(6)
    assert noise_key(6) != noise_key(7)


def own_run(scale, key=KEY):
    """A run that computes its gradients itself, so that nothing can be known about its loss."""
    run = PrivateRun(None, PARAMS, DATA, plan=PLAN, optimizer=optax.sgd(1.0), key=key)
    while run.steps_left:
        run.apply(jnp.full((len(run.sample().mask), WIDTH), scale))
    return run.params


@pytest.mark.slow
def test_gradients_of_your_own_under_one_key_are_refused_before_they_are_released():
    first = own_run(1e-6)
    np.testing.assert_array_equal(own_run(1e-6), first)
    with pytest.raises(ValueError, match=r"expected another key.*fold_in\(key, 1\)"):
        own_run(2e-6)
    own_run(2e-6, jax.random.fold_in(KEY, 1))
    own_run(1e-6, None)
    own_run(2e-6, None)
