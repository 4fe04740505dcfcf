"""Schedules: the noise, clip and batch size that run are those that are accounted."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax import samplers
from dpoptax.accounting import epsilon
from dpoptax.schedules import Schedule, as_schedule, tabulate

FALLING = Schedule((2.0, 1.0, 1.5), (3, 4, 2))


def test_a_schedule_is_read_at_every_step_and_holds_on():
    values = [2.0] * 3 + [1.0] * 4 + [1.5] * 5
    assert [float(FALLING(step)) for step in range(12)] == values
    traced = jax.jit(jax.vmap(FALLING))(jnp.arange(12))
    np.testing.assert_array_equal(traced, values)
    assert tabulate(FALLING, 12) is FALLING


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule(2.0, 40, 0.3),
        optax.linear_schedule(1.0, 3.0, 20, 5),
        optax.piecewise_constant_schedule(2.0, {7: 0.5, 30: 0.5}),
    ],
)
def test_optax_schedules_are_tabulated_as_they_are(schedule):
    table = tabulate(schedule, 50)
    assert sum(table.lengths) == 50
    with jax.numpy_dtype_promotion("standard"):
        expected = [float(schedule(jnp.asarray(step))) for step in range(50)]
    np.testing.assert_allclose([float(table(step)) for step in range(50)], expected, rtol=1e-6)


def test_schedules_have_extremes_slices_and_pieces():
    assert (FALLING.min, FALLING.max) == (1.0, 2.0)
    assert FALLING.slice(2, 8) == Schedule((2.0, 1.0, 1.5), (1, 4, 1))
    assert FALLING.slice(20, 22) == Schedule((1.5,), (2,))
    assert list(FALLING.pieces(5)) == [(2.0, 0, 3), (1.0, 3, 5)]
    constant = as_schedule(3.0)
    assert constant.slice(4, 9) is constant
    assert constant.at(7) == constant.min == constant.max == 3.0
    assert list(constant.pieces(9)) == [(3.0, 0, 9)]
    assert as_schedule(FALLING) is FALLING


def test_a_schedule_of_one_value_is_that_value():
    sampler, run = samplers.Poisson(1000, 20), {"num_steps": 90, "delta": 1e-5}
    for schedule in (Schedule((1.1,), (5,)), Schedule((1.1, 1.1), (40, 50))):
        scheduled = epsilon(sampler=sampler, noise_multiplier=schedule, **run)
        assert scheduled == epsilon(sampler=sampler, noise_multiplier=1.1, **run)


def test_a_scheduled_run_costs_what_its_parts_cost_together():
    sampler = samplers.Poisson(1000, 20)
    noise = Schedule((2.0, 1.0), (100, 50))
    event = dp_accounting.ComposedDpEvent([sampler.event(2.0, 100), sampler.event(1.0, 50)])
    whole = epsilon(sampler=sampler, noise_multiplier=noise, num_steps=150, delta=1e-5)
    assert whole == pytest.approx(dpoptax.accounting.event_epsilon(event, delta=1e-5), rel=1e-9)
    for constant, lower in ((2.0, True), (1.0, False)):
        other = epsilon(sampler=sampler, noise_multiplier=constant, num_steps=150, delta=1e-5)
        assert (other < whole) is lower


def test_zero_noise_anywhere_in_the_steps_done_is_no_privacy():
    sampler, noise = samplers.Poisson(1000, 20), Schedule((1.0, 0.0), (10, 10))
    run = {"sampler": sampler, "noise_multiplier": noise, "delta": 1e-5}
    assert epsilon(num_steps=10, **run) < math.inf
    assert epsilon(num_steps=11, **run) == math.inf


def test_noise_clip_and_size_follow_their_schedules():
    noise, clip = Schedule((2.0, 1.0), (2, 2)), Schedule((1.0, 3.0), (1, 3))
    size = Schedule((10.0, 20.0), (3, 1))
    params = jnp.zeros(20_000)
    tx = dpoptax.privatize(clip, noise, expected_batch_size=size, key=jax.random.key(0))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step, spread in enumerate([2 * 1 / 10, 2 * 3 / 10, 1 * 3 / 10, 1 * 3 / 20]):
        assert int(state.step) == step
        release, state = update(jnp.zeros((1, 20_000)), state, params)
        assert float(release.std()) == pytest.approx(spread, rel=4.5 / math.sqrt(40_000))
    quiet = dpoptax.privatize(clip, 0.0, expected_batch_size=size, key=jax.random.key(0))
    state = quiet.init(jnp.zeros(1))
    for moved in (1 / 10, 3 / 10, 3 / 10, 3 / 20):
        release, state = quiet.update(jnp.full((1, 1), 100.0), state, jnp.zeros(1))
        assert float(release[0]) == pytest.approx(moved, rel=1e-6)


@pytest.mark.slow
def test_a_plan_reads_optax_schedules_and_runs_what_it_accounts():
    plan = dpoptax.Plan(
        sampler=samplers.Poisson(100, 10),
        clip=optax.piecewise_constant_schedule(1.0, {3: 2.0}),
        noise_multiplier=optax.piecewise_constant_schedule(2.0, {2: 0.5}),
        num_steps=5,
        delta=1e-5,
    )
    assert plan.noise_multiplier == Schedule((2.0, 1.0), (2, 3))
    assert plan.clip.l2_clip == Schedule((1.0, 2.0), (3, 2))
    assert plan.clip.sensitivity("replace_one") == 4.0
    same = epsilon(
        sampler=plan.sampler, noise_multiplier=plan.noise_multiplier, num_steps=5, delta=1e-5
    )
    assert plan.epsilon() == same
    assert dpoptax.Plan.from_json(plan.to_json()) == plan
    result = dpoptax.training.fit(
        lambda params, x: jnp.sum(params * x),
        jnp.zeros(2000),
        jnp.zeros((100, 2000)),
        plan=plan,
        optimizer=optax.sgd(1.0),
        key=jax.random.key(0),
        progress=False,
    )
    # The parameters are the sum of the noise that ran: of 2, 2, 1, 2, 2 tenths.
    spread = float(jnp.std(result.params)) * 10
    assert spread == pytest.approx(math.sqrt(4 + 4 + 1 + 4 + 4), rel=4.5 / math.sqrt(4000))
    assert result.epsilon() == plan.epsilon()
    assert result.ledger.num_steps == 5


def test_stages_draw_and_cost_what_their_samplers_do():
    small, large = samplers.Poisson(1000, 10), samplers.Poisson(1000, 100)
    stages = samplers.PoissonSchedule(((small, 3), (large, 4)))
    state, sample = stages.init(jax.random.key(0)), jax.jit(stages.sample)
    sizes = []
    for _ in range(9):
        state, batch = sample(state)
        assert batch.mask.shape == (large.max_batch_size,)
        sizes.append(int(batch.mask.sum()))
    assert max(sizes[:3]) < 40 < min(sizes[3:])
    event = dp_accounting.ComposedDpEvent([small.event(1.5, 3), large.event(1.0, 6)])
    noise = Schedule((1.5, 1.0), (3, 4))
    assert stages.event(noise, 9) == event
    assert stages.event(noise, 2) == small.event(1.5, 2)
    plan = dpoptax.Plan(sampler=stages, clip=1.0, noise_multiplier=noise, num_steps=7, delta=1e-5)
    assert dpoptax.Plan.from_json(plan.to_json()) == plan


def test_a_schedule_that_overflows_is_refused_with_its_step():
    with pytest.raises(ValueError, match="finite values; got inf at step 1"):
        tabulate(lambda step: 3e38 * (step + 1.0), 3)
