"""Suggested settings: within the budget and the compute, with the rules that the docs state."""

import math

import attrs
import dp_accounting
import jax.numpy as jnp
import pytest

import dpoptax
from dpoptax import suggest
from dpoptax.accounting import event_epsilon
from dpoptax.clipping import FlatClip
from dpoptax.samplers import Poisson

MNIST = {"num_examples": 60_000, "epsilon": 3.0, "delta": 1e-5, "num_parameters": 26_000}


@pytest.mark.parametrize(
    ("changes", "compute"),
    [
        ({}, 30 * 60_000),
        ({"epsilon": 8.0, "epochs": 10}, 600_000),
        ({"num_examples": 455, "delta": 1e-4}, 300_000),
        ({"num_gradients": 1_000_000}, 1_000_000),
        ({"num_examples": 300, "delta": 1e-4, "epochs": 1000}, 300_000),
        ({"num_examples": 1000, "epochs": 1}, 1000),
    ],
)
def test_the_plan_keeps_the_budget_and_the_compute(changes, compute):
    arguments = MNIST | changes
    suggestion = suggest(**arguments)
    assert suggestion.expected_batch_size * suggestion.num_steps <= 1.01 * compute
    plan = suggestion.plan()
    assert 0.98 * arguments["epsilon"] < plan.epsilon() <= arguments["epsilon"]
    assert plan.sampler.num_examples == arguments["num_examples"]
    assert plan.num_steps == suggestion.num_steps
    assert suggest(**arguments) == suggestion


def test_the_noise_of_the_run_is_close_to_that_of_full_batches():
    suggestion = suggest(**MNIST)
    plan = suggestion.plan()
    noise = plan.noise_multiplier / (plan.sampler.expected_batch_size * plan.num_steps**0.5)
    full = dpoptax.Plan.calibrate(
        num_examples=60_000, expected_batch_size=60_000, clip=1.0, num_steps=1, epsilon=3.0,
        delta=1e-5,
    )  # fmt: skip
    # The rule's central limit theorem promises 1.1.
    assert 1.0 < noise / (full.noise_multiplier / 60_000) < 1.15
    assert "9 %" in suggestion.reasons[0] or "10 %" in suggestion.reasons[0]


def test_the_learning_rate_follows_steps_and_parameters():
    small, large = suggest(**MNIST), suggest(**(MNIST | {"num_parameters": 26_000 * 256}))
    assert large.learning_rate == pytest.approx(small.learning_rate / 4, rel=0.1)
    walk = small.learning_rate * math.sqrt(small.num_steps)
    assert walk == pytest.approx(3 * 26_000**-0.25, rel=0.05)
    few = suggest(**(MNIST | {"num_parameters": 1}))
    assert few.learning_rate * math.sqrt(few.num_steps) == pytest.approx(0.7, rel=0.05)


def test_more_budget_or_compute_never_means_less_signal():
    def noise(**changes):
        plan = suggest(**(MNIST | changes)).plan()
        return plan.noise_multiplier / (plan.sampler.expected_batch_size * plan.num_steps**0.5)

    assert noise(epsilon=1.0) > noise(epsilon=3.0) > noise(epsilon=8.0)
    assert noise(epochs=3) > noise(epochs=30)


def test_small_data_get_more_epochs_unless_the_compute_is_given():
    small = {"num_examples": 455, "epsilon": 8.0, "delta": 1e-4, "num_parameters": 31}
    suggestion = suggest(**small)
    assert 0.99 * 300_000 < suggestion.expected_batch_size * suggestion.num_steps <= 303_000
    assert suggest(**small, epochs=30).num_steps < suggestion.num_steps
    default, given = suggest(**MNIST), suggest(**MNIST, epochs=30)
    assert default == attrs.evolve(given, reasons=default.reasons)
    assert "which is the default compute" in suggestion.reasons[1]
    for compute in ({"epochs": 660}, {"num_gradients": 300_000}):
        assert "which is the compute that you gave" in suggest(**small, **compute).reasons[1]


def test_examples_that_are_fitted_contribute_little():
    weights = suggest(**MNIST).plan().clip.weights({"w": jnp.array([0.05, 2.0]) ** 2})
    short, long = weights * jnp.array([0.05, 2.0])
    assert float(short) < 0.1 * float(long)


def test_a_person_can_read_it():
    suggestion = suggest(**MNIST)
    text = str(suggestion)
    for part in ("60,000 examples", "optax.adam", "Poisson", "Why", "Sander et al. 2022"):
        assert part in text
    assert all(reason.endswith(".") for reason in suggestion.reasons)
    assert "Expect a poor model" in str(suggest(**(MNIST | {"num_parameters": 10**10})))


def test_clip_and_earlier_releases_can_be_given():
    suggestion = suggest(num_examples=1000, epsilon=1.0, delta=1e-5, num_parameters=50)
    assert suggestion.plan(clip=FlatClip(2.0)).clip == suggestion.plan(clip=2.0).clip
    earlier = dp_accounting.GaussianDpEvent(20.0)
    plan = suggestion.plan(earlier=earlier)
    assert plan.noise_multiplier > suggestion.plan().noise_multiplier
    # The plan has smaller batches than its sampler would choose, and the budget pays for them too.
    default = Poisson(1000, plan.sampler.expected_batch_size)
    assert plan.sampler.max_batch_size < default.max_batch_size
    both = dp_accounting.ComposedDpEvent([earlier, plan.event()])
    assert 0.99 < event_epsilon(both, delta=1e-5) <= 1.0


def test_the_budget_pays_for_the_smaller_batches_of_the_plan_and_for_earlier_releases():
    suggestion = suggest(num_examples=5000, epsilon=1.0, delta=1e-5, num_parameters=50, epochs=5)
    plan = suggestion.plan()
    assert (
        plan.sampler.max_batch_size < Poisson(5000, plan.sampler.expected_batch_size).max_batch_size
    )
    assert plan.epsilon() <= 1.0
    earlier = dp_accounting.GaussianDpEvent(20.0)
    plan = suggestion.plan(earlier=earlier)
    both = dp_accounting.ComposedDpEvent([earlier, plan.event()])
    assert event_epsilon(both, delta=1e-5) <= 1.0


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive"),
        ({"delta": 1.0}, ValueError, "delta must lie strictly"),
        ({"num_parameters": 0}, ValueError, "num_parameters must be at least 1"),
        ({"epochs": 0.001}, ValueError, "expected compute for at least 1,000 gradients"),
        ({"num_gradients": 10}, ValueError, "Pass more epochs"),
        ({"epochs": 3, "num_gradients": 10_000}, TypeError, "got both"),
        ({"epochs": -1.0}, ValueError, "epochs must be positive"),
    ],
)
def test_impossible_budgets_and_too_little_compute_are_refused(changes, error, match):
    with pytest.raises(error, match=match):
        suggest(**(MNIST | changes))


def test_a_large_delta_is_warned_of():
    with pytest.warns(UserWarning, match="well below 1 / num_examples"):
        suggest(**(MNIST | {"delta": 1e-3}))
