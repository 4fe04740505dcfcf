"""Plan: clip, noise and accounting come from one frozen value."""

import math

import attrs
import dp_accounting
import jax
import jax.numpy as jnp
import optax
import pytest

import dpoptax
from dpoptax import Plan, Report
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.clipping import FlatClip
from dpoptax.samplers import FixedSize, Poisson, PoissonSchedule, Shuffled
from dpoptax.schedules import Schedule

PLAN = Plan(
    sampler=dpoptax.samplers.Poisson(60_000, 128),
    clip=2.0,
    noise_multiplier=1.5,
    num_steps=9360,
    delta=1 / 60_000,
)


def test_the_published_run_under_both_relations():
    assert PLAN.epsilon() == pytest.approx(0.535, abs=1e-3)
    assert PLAN.epsilon(relation="replace_one") == pytest.approx(1.012, abs=1e-3)
    assert PLAN.epsilon(relation=dp_accounting.NeighboringRelation.REPLACE_ONE) == pytest.approx(
        1.012, abs=1e-3
    )


def test_the_number_that_clips_scales_the_noise():
    tx = PLAN.privatize(jax.random.key(0))
    params = jnp.zeros(20_000)
    release, _ = tx.update(jnp.zeros((1, 20_000)), tx.init(params), params)
    assert float(release.std()) * 128 == pytest.approx(1.5 * 2.0, rel=4.5 / math.sqrt(40_000))


@pytest.mark.slow
def test_steps_default_to_the_planned_ones():
    assert PLAN.event() == PLAN.event(9360) != PLAN.event(10)
    assert PLAN.epsilon(10) < PLAN.epsilon() == PLAN.epsilon(9360)
    assert PLAN.epsilon(0) == 0
    assert PLAN.event(0) == dp_accounting.NoOpDpEvent()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_examples", "batch_size", "epochs", "steps"),
    [(60_000, 128, 20, 9375), (60_000, 469, 1, 128), (100, 29, 29, 100), (90, 0.9 * 10, 0.1, 1)],
)
def test_epochs_become_steps_exactly(num_examples, batch_size, epochs, steps):
    plan = Plan.calibrate(
        num_examples=num_examples,
        expected_batch_size=batch_size,
        epochs=epochs,
        epsilon=5.0,
        delta=1e-5,
        clip=1.0,
    )
    assert plan.num_steps == steps
    assert plan.epsilon() <= 5.0


def test_a_plan_without_noise_says_that_it_is_not_private():
    plan = PLAN.replace(noise_multiplier=0, clip=math.inf)
    assert plan.epsilon() == math.inf
    assert plan.event() == dp_accounting.NonPrivateDpEvent()
    assert "not private" in Report.from_plan(plan).in_words()


def test_a_plan_is_frozen_and_a_value():
    assert PLAN.replace() == PLAN
    assert hash(PLAN.replace()) == hash(PLAN)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        PLAN.delta = 0.1


def test_fields_hold_values_whatever_short_form_was_given():
    schedule = optax.piecewise_constant_schedule(2.0, {3: 0.5})
    plan = PLAN.replace(clip=schedule, noise_multiplier=schedule, num_steps=5)
    assert plan.noise_multiplier == Schedule((2.0, 1.0), (3, 2))
    assert plan.clip == FlatClip(plan.noise_multiplier)
    assert PLAN.clip == FlatClip(2.0)
    assert type(PLAN.replace(noise_multiplier=2).noise_multiplier) is float


def test_what_is_replaced_is_validated():
    with pytest.raises(ValueError, match="delta must lie strictly between"):
        PLAN.replace(delta=1.0)
    with pytest.raises(TypeError, match="batch"):
        PLAN.replace(batch=3)


@pytest.mark.parametrize("sampler", [FixedSize(1000, 20), Shuffled(1000, 20)])
def test_any_sampler_and_clip_rule_are_calibrated(sampler):
    clip = FlatClip(Schedule((1.0, 2.0), (5, 5)))
    plan = Plan.calibrate(sampler=sampler, clip=clip, epochs=1, epsilon=2.0, delta=1e-5)
    assert plan.sampler is sampler
    assert plan.clip is clip
    assert plan.num_steps == 50
    assert 1.99 < plan.epsilon() <= 2.0


def test_calibration_needs_one_sampler_and_one_length():
    budget = {"clip": 1.0, "epsilon": 2.0, "delta": 1e-5}
    with pytest.raises(TypeError, match="give either sampler, or num_examples"):
        Plan.calibrate(num_steps=5, num_examples=100, **budget)
    with pytest.raises(TypeError, match="give either sampler, or num_examples"):
        Plan.calibrate(num_steps=5, sampler=Poisson(100, 5), num_examples=100, **budget)
    changing = PoissonSchedule([(Poisson(100, 5), 10), (Poisson(100, 10), 10)])
    with pytest.raises(TypeError, match="give either epochs or num_steps"):
        Plan.calibrate(sampler=changing, **budget)
    # The first ten steps use 50 examples, and the other 450 take 45 steps.
    assert Plan.calibrate(epochs=5, sampler=changing, **budget).num_steps == 55


@pytest.mark.parametrize("steps_per_round", [3, 7, 9, 469])
def test_epochs_of_balls_in_bins_begin_no_other_epoch(steps_per_round):
    # The mean batch size is not a whole number. A step more would begin another epoch.
    sampler = dpoptax.samplers.BallsInBins(1000, steps_per_round)
    assert num_steps_of(sampler, 5, None) == 5 * steps_per_round
    assert num_steps_of(sampler, 2.001, None) > 2 * steps_per_round


@pytest.mark.parametrize("epochs", [0.3, 0.5, 1, 2.0, 7])
def test_epochs_are_steps_wherever_steps_are_accepted(epochs):
    sampler = Poisson(100, 10)
    run = {"sampler": sampler, "noise_multiplier": 1.0, "delta": 1e-3}
    one = Plan(clip=1.0, epochs=epochs, **run)
    assert one.num_steps == round(10 * epochs)
    assert one.replace(epochs=2 * epochs).num_steps == round(20 * epochs)
    assert dpoptax.accounting.epsilon(epochs=epochs, **run) == one.epsilon()
    with pytest.raises(TypeError, match="give either epochs or num_steps"):
        Plan(clip=1.0, epochs=epochs, num_steps=3, **run)
