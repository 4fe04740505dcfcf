"""The plan: one value from which clip, noise and statement come."""

import dataclasses
import math

import dp_accounting
import jax
import jax.numpy as jnp
import pytest

import dpoptax
from dpoptax import Plan

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


def test_steps_default_to_the_planned_ones():
    assert PLAN.event() == PLAN.event(9360) != PLAN.event(10)
    assert PLAN.epsilon(10) < PLAN.epsilon() == PLAN.epsilon(9360)
    assert PLAN.epsilon(0) == 0
    assert PLAN.event(0) == dp_accounting.NoOpDpEvent()


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "epochs", "steps"),
    [(60_000, 128, 20, 9375), (60_000, 469, 1, 128), (100, 29, 29, 100), (90, 0.9 * 10, 0.1, 1)],
)
def test_epochs_become_steps_exactly(num_examples, batch_size, epochs, steps):
    plan = Plan.calibrate(
        num_examples=num_examples,
        batch_size=batch_size,
        epochs=epochs,
        epsilon=5.0,
        delta=1e-4,
        l2_clip=1.0,
    )
    assert plan.num_steps == steps
    assert plan.epsilon() <= 5.0


def test_a_plan_without_noise_says_that_it_is_not_private():
    plan = dataclasses.replace(PLAN, noise_multiplier=0, clip=math.inf)
    assert plan.epsilon() == math.inf
    assert plan.event() == dp_accounting.NonPrivateDpEvent()
    assert "not private" in str(plan.report())


def test_a_plan_is_frozen_and_a_value():
    assert dataclasses.replace(PLAN) == PLAN
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.delta = 0.1
