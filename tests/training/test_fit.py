"""Training learns, shows the epsilon that it cost, and compiles once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.reports import round_up
from dpoptax.training import fit, init_state, make_train_step
from dpoptax.training._dispatch import _Steps

SAMPLER = dpoptax.samplers.Poisson(400, 40)
PLAN = dpoptax.Plan(sampler=SAMPLER, clip=1.0, noise_multiplier=1.0, num_steps=60, delta=1e-4)
DATA = 3.0 + jax.random.normal(jax.random.key(7), (400, 2))


def loss_fn(params, example):
    return jnp.sum((params - example) ** 2)


def run(**changes):
    options = {
        "plan": PLAN,
        "optimizer": optax.sgd(0.3),
        "key": jax.random.key(0),
        "progress": False,
    }
    return fit(loss_fn, jnp.zeros(2), DATA, **(options | changes))


def test_it_learns_privately_and_reports_what_ran():
    result = run()
    assert float(jnp.abs(result.params - 3.0).max()) < 0.5
    assert result.epsilon() == PLAN.epsilon()
    assert "60 done of 60 planned" in str(result.report())


def test_the_bar_shows_every_epsilon_beside_the_steps_that_incurred_it(capfd):
    run(progress=True)
    text = capfd.readouterr().err
    assert "60/60" in text
    shown = re.findall(r"ε = ([\d.]+) at δ = 0.0001 after (\d+) steps?", text)
    assert (round_up(PLAN.epsilon()), "60") in shown
    assert "after 1 steps" not in text
    for epsilon, steps in shown:
        assert epsilon == round_up(PLAN.epsilon(int(steps)))


def test_the_bar_can_be_turned_off(capfd):
    run(progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_the_loss_is_traced_a_fixed_number_of_times_whatever_the_batches():
    def traced(num_steps):
        traces = []

        def counting(params, example):
            traces.append(1)
            return loss_fn(params, example)

        plan = dpoptax.Plan(
            sampler=SAMPLER, clip=1.0, noise_multiplier=1.0, num_steps=num_steps, delta=1e-4
        )
        fit(counting, jnp.zeros(2), DATA, plan=plan, optimizer=optax.sgd(0.1),
            key=jax.random.key(0), progress=False)  # fmt: skip
        return len(traces)

    assert traced(40) == traced(3)


def test_a_plan_of_no_steps_returns_the_initial_parameters():
    plan = dpoptax.Plan(sampler=SAMPLER, clip=1.0, noise_multiplier=1.0, num_steps=0, delta=1e-4)
    result = run(plan=plan)
    np.testing.assert_array_equal(result.params, jnp.zeros(2))
    assert result.epsilon() == 0


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_the_step_is_pure(jit):
    keys = dpoptax.random.split_by_purpose(jax.random.key(0))
    tx = dpoptax.dp_sgd(0.1, 1.0, noise_multiplier=1.0, expected_batch_size=40, key=keys.noise_key)
    step = make_train_step(loss_fn, tx=tx, sampler=SAMPLER)
    state = init_state(
        jnp.zeros(2),
        tx=tx,
        sampler=SAMPLER,
        sampling_key=keys.sampling_key,
        model_key=keys.model_key,
    )
    step = jax.jit(step) if jit else step
    first, info = step(state, DATA)
    again, _ = step(state, DATA)
    np.testing.assert_array_equal(first.params, again.params)
    assert 10 < int(info.nonprivate_batch_size) < 80
    assert float(info.nonprivate_loss) > 1


def test_a_loss_that_draws_gets_another_key_every_step():
    def noisy(params, example, key):
        return jnp.vdot(params, jax.random.normal(key, (2,)))

    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(4, 4), clip=1e6, noise_multiplier=0.0, num_steps=2,
        delta=1e-4,
    )  # fmt: skip
    options = {"optimizer": optax.sgd(1.0), "key": jax.random.key(0), "progress": False}
    two = fit(noisy, jnp.zeros(2), jnp.zeros((4, 2)), plan=plan, **options).params
    one = fit(
        noisy,
        jnp.zeros(2),
        jnp.zeros((4, 2)),
        plan=dpoptax.Plan(
            sampler=plan.sampler, clip=1e6, noise_multiplier=0.0, num_steps=1, delta=1e-4
        ),
        **options,
    ).params
    assert not np.allclose(two, 2 * one)


def test_progress_calls_a_function():
    seen = []
    result = run(progress=seen.append)
    assert seen[-1].step == seen[-1].num_steps == 60
    assert seen[-1].epsilon == result.epsilon()
    assert seen[-1].seconds_left == 0
    for progress in seen:
        assert progress.delta == PLAN.delta
        assert progress.epsilon == PLAN.epsilon(progress.step)


@pytest.mark.slow
@pytest.mark.parametrize("microbatch_size", [None, 16])
@pytest.mark.parametrize("data", [DATA, dpoptax.training.HostData(np.asarray(DATA))])
def test_readings_that_are_not_private_are_those_of_the_last_step(microbatch_size, data):
    seen = []
    options = {"plan": PLAN, "optimizer": optax.sgd(0.3), "key": jax.random.key(0)}
    result = fit(
        loss_fn, jnp.zeros(2), data, **options, progress=seen.append, diagnostics=True,
        microbatch_size=microbatch_size,
    )  # fmt: skip
    before = run(plan=PLAN.replace(num_steps=59)).state
    _, batch = PLAN.sampler.sample(before.sampler_state)  # with its own padding
    rows = np.asarray(DATA)[np.asarray(batch.indices)[np.asarray(batch.mask)]]
    away = np.linalg.norm(np.asarray(before.params) - rows, axis=1)
    found = seen[-1].nonprivate
    assert int(found.nonprivate_batch_size) == len(rows)
    np.testing.assert_allclose(found.nonprivate_loss, np.mean(away**2), rtol=1e-4)
    np.testing.assert_allclose(found.nonprivate_median_norm, np.median(2 * away), rtol=1e-4)
    np.testing.assert_allclose(found.nonprivate_clip_fraction, np.mean(2 * away > 1), rtol=1e-4)
    np.testing.assert_allclose(result.params, run().params, rtol=1e-5)


def test_readings_that_are_not_private_are_given_only_when_asked_for(capfd):
    seen = []
    run(progress=seen.append)
    assert all(progress.nonprivate is None for progress in seen)
    run(progress=True)
    assert "loss" not in capfd.readouterr().err
    run(progress=True, diagnostics=True)
    assert re.search(r"not private: loss [\d.]+, \d+% clipped, median norm", capfd.readouterr().err)


@pytest.mark.untyped  # an array in place of a state
@pytest.mark.parametrize(
    ("layout", "in_a_loop"), [("NHWC,HWIO,NHWC", True), ("NCHW,OIHW,NCHW", False)]
)
def test_only_steps_with_slow_convolutions_are_dispatched_one_by_one(layout, in_a_loop):
    def step(state, kernel):
        numbers = tuple(layout.split(","))
        moved = jax.lax.conv_general_dilated(
            state, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        return moved, None

    kernel = 2.0 * jnp.ones((1, 1, 3, 3) if in_a_loop else (3, 3, 1, 1))
    steps = _Steps(step, lambda data, _: data, diagnostics=False, count_nonfinite=False)
    state, _ = steps.run(jnp.ones((2, 3, 3, 3)), kernel, 2)
    np.testing.assert_allclose(state, 36.0)  # two products with 3 channels and a kernel of 2
    assert steps._loops is in_a_loop


@pytest.mark.slow
def test_a_convolution_is_stepped_as_any_other_model():
    """The numbers are those of the bare step."""
    images = jax.random.normal(jax.random.key(3), (400, 6, 6, 1))

    def conv_loss(kernel, image):
        found = jax.lax.conv_general_dilated(
            image[None], kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(found**2)

    plan = dpoptax.Plan(sampler=SAMPLER, clip=1.0, noise_multiplier=1.0, num_steps=5, delta=1e-4)
    initial = jnp.ones((3, 3, 1, 2))
    key = jax.random.key(0)
    result = fit(
        conv_loss, initial, images, plan=plan, optimizer=optax.sgd(0.1), key=key, progress=False
    )
    # The state before the first step, with the keys that `fit` derives from the program.
    state = fit(
        conv_loss, initial, images, plan=plan.replace(num_steps=0), optimizer=optax.sgd(0.1),
        key=key, progress=False,
    ).state  # fmt: skip
    tx = optax.chain(plan.privatize(jax.random.key(1)), optax.sgd(0.1))
    step = jax.jit(make_train_step(conv_loss, tx=tx, sampler=plan.sampler))
    for _ in range(5):
        state, _ = step(state, images)
    np.testing.assert_allclose(result.params, state.params, rtol=1e-5)
