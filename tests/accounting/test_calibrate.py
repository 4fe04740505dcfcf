"""Calibration: within the budget, tight, and with a useful error if the budget is out of reach."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

import dpoptax
from dpoptax import Plan
from dpoptax.accounting import (
    calibrate_batch_size,
    calibrate_noise_multiplier,
    calibrate_num_steps,
    epsilon,
)
from dpoptax.accounting._search import largest_feasible, smallest_root
from dpoptax.samplers import FixedSize, Poisson, PoissonSchedule, Shuffled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "delta", "num_examples", "expected", "steps", "reference"),
    [
        (1.0, 1e-5, 60_000, 128, 9375, 1.02866),
        (3.0, 1e-5, 60_000, 128, 9375, 0.67031),
        (8.0, 1e-5, 60_000, 128, 9375, 0.51697),
        (1.0, 1e-6, 1000, 100, 512, 9.661829),
        (8.0, 1e-5, 1000, 40, 2250, 1.3459976),
        (8.0, 1e-5, 1000, 40, 2000, 1.2900681),
        (0.5, 1e-7, 10**6, 1024, 9766, 1.1508010),
    ],
)
def test_noise_against_reference_values(target, delta, num_examples, expected, steps, reference):
    run = {"sampler": Poisson(num_examples, expected), "num_steps": steps, "delta": delta}
    noise_multiplier, achieved = calibrate_noise_multiplier(epsilon=target, **run)
    assert noise_multiplier == pytest.approx(reference, rel=2e-3)
    assert achieved == epsilon(noise_multiplier=noise_multiplier, **run)
    assert 0.998 * target <= achieved <= target


@pytest.mark.slow
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize(
    ("target", "expected", "steps"),
    [
        (1.0, 10, 200),
        (20.0, 1000, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0.05, 10, 200), (8.0, 10, 200), (1.0, 1000, 3))
        ),
    ],
)
def test_noise_is_feasible_and_tight(target, expected, steps, relation):
    run = {
        "sampler": Poisson(1000, expected),
        "num_steps": steps,
        "delta": 1e-5,
        "relation": relation,
    }
    noise_multiplier, _ = calibrate_noise_multiplier(epsilon=target, **run)
    assert epsilon(noise_multiplier=noise_multiplier, **run) <= target
    assert epsilon(noise_multiplier=noise_multiplier * 0.997, **run) > target


# A wider range than anybody plans for.
targets = st.floats(math.log(0.01), math.log(50)).map(math.exp)
deltas = st.floats(math.log(1e-12), math.log(1e-3)).map(math.exp)
rates = st.floats(math.log(1e-7), 0.0).map(math.exp)
step_counts = st.floats(0.0, math.log(1e7)).map(lambda x: round(math.exp(x)))


@pytest.mark.filterwarnings("ignore:delta should be well below")
@pytest.mark.nightly
@hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(target=targets, delta=deltas, rate=rates, steps=step_counts)
def test_round_trips_at_the_extremes(target, delta, rate, steps):
    num_examples = 10**7
    sampler = Poisson(num_examples, max(rate * num_examples, 1.0), num_examples)
    run = {"sampler": sampler, "num_steps": steps, "delta": delta}
    noise_multiplier, achieved = calibrate_noise_multiplier(epsilon=target, **run)
    assert achieved == epsilon(noise_multiplier=noise_multiplier, **run) <= target
    if noise_multiplier > 0.1 * 1.001:
        assert epsilon(noise_multiplier=0.99 * noise_multiplier, **run) > target
    if noise_multiplier < 1e4:
        again, spent = calibrate_num_steps(
            epsilon=target, delta=delta, sampler=sampler, noise_multiplier=noise_multiplier
        )
        assert spent <= target
        assert again >= steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "relation"),
    [
        (Poisson(60_000, 128), "add_or_remove_one"),
        (Poisson(60_000, 128), "replace_one"),
        (FixedSize(60_000, 128), "add_or_remove_one"),
        (Shuffled(1000, 100), "replace_special"),
        (PoissonSchedule(((Poisson(6000, 12), 50), (Poisson(6000, 24), 50))), "add_or_remove_one"),
    ],
)
def test_the_most_steps_are_the_most(sampler, relation):
    run = {"sampler": sampler, "noise_multiplier": 3.0, "delta": 1e-5, "relation": relation}
    steps, achieved = calibrate_num_steps(epsilon=2.0, **run)
    assert isinstance(steps, int)
    assert achieved == epsilon(num_steps=steps, **run) <= 2.0 < epsilon(num_steps=steps + 1, **run)


@pytest.mark.slow
def test_steps_and_sizes_against_published_ones():
    run = {"epsilon": 1.0, "delta": 1e-5, "noise_multiplier": 1.1}
    steps, _ = calibrate_num_steps(sampler=Poisson(60_000, 128), **run)
    assert steps == pytest.approx(11_673, rel=1e-3)
    for kind in ({"num_steps": 9380}, {"epochs": 20}):
        size, achieved = calibrate_batch_size(num_examples=60_000, **kind, **run)

        def cost(size, kind=kind):
            count = kind.get("num_steps") or math.ceil(20 * 60_000 / size)
            sampler = Poisson(60_000, size)
            return epsilon(sampler=sampler, noise_multiplier=1.1, num_steps=count, delta=1e-5)

        assert achieved == cost(size) <= 1.0 < cost(size + 1)


def test_sizes_of_other_samplers():
    run = {"epsilon": 2.0, "delta": 1e-5, "num_examples": 6000, "noise_multiplier": 2.0}
    poisson = calibrate_batch_size(num_steps=1000, **run).batch_size
    full = calibrate_batch_size(num_steps=1000, make_sampler=FixedSize, **run).batch_size
    assert 1 <= full < poisson


@pytest.mark.filterwarnings("ignore:delta should be well below")
def test_the_smallest_noise_is_returned_if_it_suffices():
    run = {"sampler": Poisson(10**7, 1), "num_steps": 1, "delta": 1e-3}
    assert calibrate_noise_multiplier(epsilon=5.0, **run) == (pytest.approx(0.1), 0.0)


def test_a_budget_out_of_reach_is_refused_with_the_best_that_is_possible():
    with pytest.raises(ValueError, match=r"epsilon = 1e-09 .* out of reach: even .* costs \d"):
        calibrate_noise_multiplier(
            epsilon=1e-9, delta=1e-9, sampler=Poisson(100, 50, 50), num_steps=1000
        )
    with pytest.raises(ValueError, match=r"one step at noise multiplier 0.5 costs 8\.98"):
        calibrate_num_steps(epsilon=0.1, delta=1e-5, sampler=Poisson(100, 50), noise_multiplier=0.5)
    with pytest.raises(ValueError, match=r"1000 steps with one example each cost \d+\.\d+"):
        calibrate_batch_size(
            epsilon=0.1, delta=1e-5, num_examples=100, noise_multiplier=0.5, num_steps=1000
        )


def test_a_plan_is_calibrated():
    plan = Plan.calibrate(
        num_examples=6000, expected_batch_size=60, clip=0.5, epochs=10, epsilon=1.0, delta=1e-5
    )
    assert plan.num_steps == 1000
    assert 0.998 < plan.epsilon() <= 1.0
    assert plan.clip == dpoptax.clipping.FlatClip(0.5)


@pytest.mark.parametrize("exponent", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("answer", [0, 1, 2, 17, 999_999, 10**9])
@pytest.mark.parametrize("guess", [1e-9, 3.0, 1e6, 1e30])
def test_the_search_for_a_whole_number_finds_it_in_few_steps(exponent, answer, guess):
    asked = []

    def excess(number):
        asked.append(number)
        return exponent * (math.log(number) - math.log(answer + 0.5))

    assert largest_feasible(excess, guess, 10**9) == answer
    assert len(asked) < 25
    assert len(set(asked)) == len(asked)


def test_the_search_for_a_whole_number_survives_steps_and_infinities():
    def excess(number):
        if number > 5000:
            return 1e3
        return -1.0 if number // 10 < 123 else 0.5

    assert largest_feasible(excess, 7.0, 10**9) == 1229


def test_the_search_for_a_root():
    assert smallest_root(lambda x: 3.0 - x, 0.0, -5.0, 50.0) == pytest.approx(3.0, abs=1e-4)
    assert smallest_root(lambda x: 3.0 - x, 5.0, 4.0, 50.0) == 4.0
    assert smallest_root(lambda x: 3.0 - x, 0.0, -5.0, 2.0) == math.inf
