"""The padded size that a plan chooses: small, at no noticeable cost."""

import pytest
import scipy.stats

from dpoptax import Plan
from dpoptax.accounting import epsilon
from dpoptax.samplers import (
    BallsInBins,
    CyclicPoisson,
    FixedSize,
    Poisson,
    RandomCyclicPoisson,
    UserPoisson,
)

RUN = {"noise_multiplier": 1.1, "num_steps": 1000, "delta": 1e-5}


def plan_of(sampler, **changes):
    return Plan(sampler=sampler, clip=1.0, **(RUN | changes))


@pytest.mark.parametrize(
    ("sampler", "decides"),  # the number of steps at which a smaller size would cost too much
    [
        (Poisson(60_000, 128), 30_000),
        pytest.param(BallsInBins(6_000, 47), 1000, marks=pytest.mark.slow),
        pytest.param(UserPoisson(range(6_000), 128, 1), 30_000, marks=pytest.mark.slow),
    ],
)
def test_a_plan_pads_as_little_as_costs_almost_nothing(sampler, decides):
    plan = plan_of(sampler)
    size = plan.sampler.max_batch_size
    assert type(plan.sampler) is type(sampler)
    assert plan.sampler.expected_batch_size == sampler.expected_batch_size
    assert 1.3 * 128 < size < sampler.max_batch_size - 25
    assert size % 8 == 0
    unlimited = epsilon(sampler=sampler, **RUN)
    assert unlimited < plan.epsilon() < 1.0012 * unlimited
    run = RUN | {"num_steps": decides}
    assert epsilon(sampler=sampler.resized(size - 13), **run) > 1.001 * epsilon(
        sampler=sampler, **run
    )


def test_a_plan_takes_177_rows_at_most_for_batches_of_128_of_60_000():
    assert plan_of(Poisson(60_000, 128)).sampler.max_batch_size == 176


def test_a_limit_that_costs_nothing_still_leaves_room_for_usual_batches():
    sampler = plan_of(CyclicPoisson(60_000, 128, 10)).sampler
    assert scipy.stats.binom.sf(sampler.max_batch_size, 6_000, sampler.sampling_rate) < 0.01
    assert sampler.max_batch_size <= 160


def test_samplers_of_one_rate_and_other_sizes_are_told_apart():
    large, small = (plan_of(CyclicPoisson(n, n / 50, 10)).sampler for n in (60_000, 6_000))
    assert large.max_batch_size > 1200 > 200 > small.max_batch_size


def test_groups_that_examples_draw_have_places_for_usual_batches():
    sampler = plan_of(RandomCyclicPoisson(60_000, 128, 10)).sampler
    assert 160 < sampler.max_batch_size < 200


def test_a_size_that_was_given_stays():
    assert plan_of(Poisson(60_000, 128, 150)).sampler.max_batch_size == 150
    assert plan_of(FixedSize(60_000, 128)).sampler.max_batch_size == 128


def test_a_run_without_noise_or_padding_keeps_its_sampler():
    sampler = Poisson(60_000, 128)
    assert plan_of(sampler, noise_multiplier=0.0).sampler == sampler
    assert plan_of(Poisson(60_000, 10)).sampler == Poisson(60_000, 10)


def test_a_plan_that_was_read_has_the_size_that_was_written():
    plan = plan_of(Poisson(60_000, 128))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.replace(num_steps=10).sampler == plan.sampler


def test_a_run_that_is_extended_keeps_its_sampler():
    sampler = Poisson(60_000, 128)
    assert plan_of(sampler, num_steps=20).sampler == plan_of(sampler, num_steps=30_000).sampler


def test_calibration_pays_for_the_smaller_batches():
    sampler = Poisson(60_000, 128)
    run = {"clip": 1.0, "epochs": 1, "epsilon": 1.0, "delta": 1e-5}
    plan = Plan.calibrate(sampler=sampler, **run)
    assert plan.sampler.max_batch_size < sampler.max_batch_size
    assert 0.997 < plan.epsilon() <= 1.0
