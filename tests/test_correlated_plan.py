"""Plans with correlated noise: the number of bands, the error, and the report."""

import json

import pytest

from dpoptax import Plan, Report, correlated_plan
from dpoptax.mechanisms import Correlated, Gaussian
from dpoptax.mechanisms.strategies import BandedToeplitz, prefix_sum_error
from dpoptax.samplers import CyclicPoisson, Poisson, RandomCyclicPoisson

MNIST = {"num_examples": 60_000, "clip": 1.0, "epochs": 20, "delta": 1e-5}
SMALL = {"num_examples": 800, "expected_batch_size": 20, "clip": 1.0, "epochs": 5, "delta": 1e-5}


def error(plan, momentum=0.0):
    """Root mean squared error of the prefix sums, in clip bounds."""
    strategy = BandedToeplitz((1.0,), plan.num_steps)
    if not isinstance(plan.mechanism, Gaussian):
        strategy = plan.mechanism.strategy
    return plan.noise_multiplier * prefix_sum_error(strategy, momentum=momentum)


def independent(**settings):
    return Plan.calibrate(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "epsilon", "largest"),
    [(1024, 8.0, 0.65), (1024, 4.0, 0.80), (1024, 1.0, 0.99), (4096, 8.0, 0.86), (4096, 1.0, 1.0)],
)
def test_the_error_of_mnist_is_as_published_in_the_docs(batch, epsilon, largest):
    settings = MNIST | {"expected_batch_size": batch, "epsilon": epsilon}
    plan, ordinary = correlated_plan(**settings), independent(**settings)
    assert plan.epsilon() <= epsilon
    # One band where it is best: the very same plan.
    assert error(plan) <= largest * error(ordinary)
    if largest == 1.0:
        assert plan == ordinary


@pytest.mark.seconds
@pytest.mark.parametrize("epsilon", [0.2, 8.0])
def test_the_plan_is_never_worse_than_independent_noise(epsilon):
    plan = correlated_plan(**SMALL, epsilon=epsilon, max_bands=4)
    ordinary = independent(**SMALL, epsilon=epsilon)
    assert plan.epsilon() <= epsilon
    assert plan.sampler.relation == ordinary.sampler.relation == "add_or_remove_one"
    assert error(plan) <= error(ordinary) * 1.001
    if epsilon < 1:
        assert isinstance(plan.mechanism, Gaussian)
        assert isinstance(plan.sampler, Poisson)
    else:
        assert error(plan) < 0.8 * error(ordinary)
        assert isinstance(plan.sampler, RandomCyclicPoisson)
        assert plan.sampler.num_groups == plan.mechanism.strategy.num_bands == 4


@pytest.mark.seconds
def test_limits_of_the_number_of_bands():
    few = correlated_plan(**SMALL, epsilon=8.0, max_bands=2)
    assert few.mechanism.strategy.num_bands == 2
    # A group must be as large as a batch, so that large batches leave no room for bands.
    large = SMALL | {"num_examples": 30}
    assert isinstance(correlated_plan(**large, epsilon=8.0).mechanism, Gaussian)
    one_step = {name: value for name, value in SMALL.items() if name != "epochs"}
    plan = correlated_plan(**one_step, num_steps=1, epsilon=8.0)
    assert isinstance(plan.mechanism, Gaussian)


@pytest.mark.slow
def test_momentum_changes_the_coefficients():
    with_momentum = correlated_plan(**SMALL, epsilon=8.0, momentum=0.9, max_bands=3)
    without = correlated_plan(**SMALL, epsilon=8.0, max_bands=3)
    assert error(with_momentum, 0.9) < error(without, 0.9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_bands": 0}, "max_bands must be at least 1"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"expected_batch_size": 0.5}, "sampling rate"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        correlated_plan(**(SMALL | {"epsilon": 8.0} | changes))


def test_the_report_says_how_noise_is_correlated():
    plan = Plan(
        sampler=CyclicPoisson(200, 20, 4, max_batch_size=50),
        clip=1.0,
        noise_multiplier=1.5,
        num_steps=200,
        delta=1e-5,
        mechanism=Correlated(BandedToeplitz.optimal(4, num_steps=200)),
    )
    report = Report.from_plan(plan)
    assert report.epsilon == plan.epsilon()
    assert report.correlation == {
        "strategy": "BandedToeplitz",
        "num_bands": 4,
        "num_steps": 200,
        "participation": "each example can take part in 50 steps at most, 4 steps apart. Chance "
        "decides in which of them it does",
    }
    text = " ".join(str(report).split())
    assert "takes back a part of the noise of the 3 steps before" in text
    assert "for at most 200 steps" in text
    assert "The noise of all steps belongs together" in text
    assert json.loads(report.to_json())["correlation"]["num_bands"] == 4
    # Without sampling, and for groups, the noise of several steps counts together.
    assert report.epsilon < report.epsilon_unamplified < float("inf")
    assert report.epsilon < report.epsilon_by_group_size[2] < float("inf")
    ordinary = Report.from_plan(plan.replace(mechanism=Gaussian()))
    assert ordinary.correlation is None
    assert ordinary.epsilon == report.epsilon
    assert ordinary.epsilon_unamplified < report.epsilon_unamplified
    assert "Correlated noise" not in str(ordinary)
