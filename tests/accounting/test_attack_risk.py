"""Noise for a limit on an attack: exact for one Gaussian, a bound and tight for sampled batches."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

import dpoptax
from dpoptax import Plan, Report
from dpoptax.accounting import (
    Advantage,
    PosteriorBelief,
    Reconstruction,
    TruePositiveRate,
    calibrate_batch_size,
    calibrate_noise_multiplier,
    calibrate_num_steps,
    epsilon,
)
from dpoptax.accounting._epsilon import event_privacy_loss
from dpoptax.samplers import FixedSize, Poisson, Shuffled, UserPoisson

FULL = {"sampler": Poisson(1000, 1000), "num_steps": 1, "delta": 1e-5}
QUANTILE = scipy.special.ndtri

# A limit, and the mu of the Gaussian mechanism that has exactly this risk.
EXACT = [
    (Advantage(1e-3), 2 * QUANTILE(0.5005)),
    (Advantage(0.1), 2 * QUANTILE(0.55)),
    (Advantage(0.99), 2 * QUANTILE(0.995)),
    (TruePositiveRate(0.05, false_positive_rate=0.01), QUANTILE(0.05) - QUANTILE(0.01)),
    (TruePositiveRate(1e-5, false_positive_rate=1e-6), QUANTILE(1e-5) - QUANTILE(1e-6)),
    (TruePositiveRate(1e-6, false_positive_rate=1e-8), QUANTILE(1e-6) - QUANTILE(1e-8)),
    (Reconstruction(0.2, baseline=0.1), QUANTILE(0.2) - QUANTILE(0.1)),
    (Reconstruction(0.999, baseline=0.1), QUANTILE(0.999) - QUANTILE(0.1)),
]


@pytest.mark.parametrize(("risk", "mu"), EXACT, ids=[str(risk) for risk, _ in EXACT])
def test_the_noise_of_one_full_batch_is_that_of_the_closed_form(risk, mu):
    noise, spent = calibrate_noise_multiplier(risk=risk, **FULL)
    assert 1 <= noise * mu < 1.001
    assert spent == epsilon(noise_multiplier=noise, **FULL)


@pytest.mark.parametrize(("belief", "prior"), [(0.6, 0.5), (0.02, 0.01), (0.99, 0.01)])
def test_noise_for_a_belief_fails_with_probability_delta_at_most(belief, prior):
    risk = PosteriorBelief(belief, prior=prior)
    noise, _ = calibrate_noise_multiplier(risk=risk, **FULL)
    gain = scipy.special.logit(belief) - scipy.special.logit(prior)
    tail = scipy.stats.norm.sf(gain * noise - 0.5 / noise)
    assert 0.2e-5 < tail <= 1e-5
    # Noise for which epsilon is this gain is too little.
    naive, _ = calibrate_noise_multiplier(epsilon=gain, **FULL)
    assert scipy.stats.norm.sf(gain * naive - 0.5 / naive) > 2e-5
    assert naive < noise


RISKS = [
    Advantage(0.1),
    TruePositiveRate(0.05, false_positive_rate=0.01),
    PosteriorBelief(0.7, prior=0.5),
    Reconstruction(0.1, baseline=0.01),
]
SAMPLERS = [
    Poisson(6000, 64, max_batch_size=75),  # batches that are drawn again
    FixedSize(6000, 64),
    Shuffled(6000, 60),
    UserPoisson(range(6000), 64, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("risk", "sampler"),
    list(zip(RISKS, SAMPLERS, strict=True)),
    ids=lambda one: type(one).__name__,
)
def test_a_plan_is_within_the_limit_and_not_wasteful(risk, sampler):
    run = {"sampler": sampler, "clip": 1.0, "num_steps": 100, "delta": 1e-5}
    plan = Plan.calibrate(risk=risk, **run)
    assert risk.bound(plan.privacy_loss(), plan.delta) <= risk.limit
    less = plan.replace(noise_multiplier=0.997 * plan.noise_multiplier)
    assert risk.bound(less.privacy_loss(), plan.delta) > risk.limit


@pytest.mark.slow
def test_the_report_of_a_plan_shows_no_more_than_the_limit():
    run = {"sampler": Poisson(1000, 50), "clip": 1.0, "num_steps": 20, "delta": 1e-5}
    read = {
        Advantage(0.1): lambda report: report.advantage,
        TruePositiveRate(0.05, false_positive_rate=0.01): lambda r: r.true_positive_rate[0.01],
        PosteriorBelief(0.7, prior=0.5): lambda report: report.posterior_belief[0.5],
        Reconstruction(0.1, baseline=0.01): lambda report: report.reconstruction[0.01],
    }
    for risk, value in read.items():
        report = Report.from_plan(Plan.calibrate(risk=risk, **run))
        assert 0.99 * risk.limit < value(report) <= risk.limit


@pytest.mark.slow
def test_a_report_that_does_not_pay_for_overflow_shows_no_more_either():
    # A batch of equal size from balls in bins is cut, and is paid from delta where it is rare.
    sampler = dpoptax.samplers.BallsInBins(2000, 50, 82)
    assert 5e-8 < _overflow(sampler) < 5e-7
    plan = Plan.calibrate(sampler=sampler, clip=1.0, num_steps=40, delta=1e-5, risk=Advantage(0.1))
    of_report = event_privacy_loss(plan.event(), delta=1e-6, relation=sampler.relation)
    for loss in (plan.privacy_loss(), of_report):
        assert Advantage(0.1).bound(loss, 1e-5) <= 0.1
    assert plan.privacy_loss().overflow > of_report.overflow


def _overflow(sampler):
    event = sampler.event(3.0, 40)
    return event_privacy_loss(event, delta=1e-5, relation=sampler.relation).overflow


@pytest.mark.seconds
def test_noise_falls_as_the_limit_rises():
    limits = {
        Advantage: ((0.1, 0.4), {}),
        TruePositiveRate: ((0.02, 0.5), {"false_positive_rate": 0.01}),
        PosteriorBelief: ((0.51, 0.9), {"prior": 0.5}),
        Reconstruction: ((0.02, 0.5), {"baseline": 0.01}),
    }
    run = {"sampler": Poisson(1000, 50), "num_steps": 20, "delta": 1e-5}
    for make, (values, given) in limits.items():
        noises = [
            calibrate_noise_multiplier(risk=make(value, **given), **run).noise_multiplier
            for value in values
        ]
        assert noises == sorted(noises, reverse=True)


def test_a_replaced_example_needs_more_noise():
    run = {"sampler": Poisson(1000, 50), "num_steps": 20, "delta": 1e-5, "risk": Advantage(0.1)}
    usual = calibrate_noise_multiplier(**run).noise_multiplier
    assert calibrate_noise_multiplier(relation="replace_one", **run).noise_multiplier > usual


def test_earlier_releases_are_paid_for():
    sampler = Poisson(1000, 50)
    run = {"sampler": sampler, "num_steps": 20, "delta": 1e-5, "risk": Advantage(0.1)}
    usual = calibrate_noise_multiplier(**run).noise_multiplier
    earlier = sampler.event(1.0, 1)
    assert calibrate_noise_multiplier(earlier=earlier, **run).noise_multiplier > usual


def test_the_most_steps_and_the_largest_batch_within_a_limit():
    risk = Advantage(0.2)

    def bound(size, steps):
        event = Poisson(1000, size).event(2.0, steps)
        return risk.bound(event_privacy_loss(event, delta=1e-5), 1e-5)

    run = {"risk": risk, "delta": 1e-5, "noise_multiplier": 2.0}
    steps, spent = calibrate_num_steps(sampler=Poisson(1000, 50), **run)
    assert bound(50, steps) <= 0.2 < bound(50, steps + 1)
    accounted = {"noise_multiplier": 2.0, "delta": 1e-5}
    assert spent == epsilon(sampler=Poisson(1000, 50), num_steps=steps, **accounted)
    size, spent = calibrate_batch_size(num_examples=1000, num_steps=20, **run)
    assert bound(size, 20) <= 0.2 < bound(size + 1, 20)
    assert spent == epsilon(sampler=Poisson(1000, size), num_steps=20, **accounted)


def test_correlated_noise_is_calibrated_to_a_limit():
    strategy = dpoptax.mechanisms.strategies.BandedToeplitz.optimal(4, 20)
    mechanism = dpoptax.mechanisms.Correlated(strategy)
    sampler = dpoptax.samplers.RandomCyclicPoisson(1000, 50, 4)
    run = {"sampler": sampler, "num_steps": 20, "delta": 1e-5, "clip": 1.0}
    plan = Plan.calibrate(mechanism=mechanism, risk=Advantage(0.1), **run)
    assert 0.0998 < dpoptax.accounting.trade_off.advantage(plan.privacy_loss()) <= 0.1


WRONG = {
    "none": (lambda: Advantage(0.0), "limit of Advantage is a probability.* got 0"),
    "all": (lambda: Advantage(1.0), "1 needs no noise"),
    "percent": (lambda: Advantage(10), r"10 % is 0\.1"),
    "nan": (lambda: Advantage(math.nan), "limit must be a number; got nan"),
    "guess": (
        lambda: TruePositiveRate(0.05, false_positive_rate=0.05),
        r"must be above false_positive_rate.* got 0\.05 and false_positive_rate=0\.05",
    ),
    "tiny": (lambda: TruePositiveRate(0.05, false_positive_rate=1e-9), "from 1e-08 to below 1"),
    "belief": (lambda: PosteriorBelief(0.4, prior=0.5), "limit of PosteriorBelief must be above"),
    "baseline": (lambda: Reconstruction(0.1, baseline=0.0), "baseline of Reconstruction is a prob"),
}


@pytest.mark.parametrize(("make", "match"), WRONG.values(), ids=WRONG)
def test_a_limit_that_means_nothing_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.untyped
def test_a_budget_is_an_epsilon_or_a_risk():
    for given in ({}, {"epsilon": 1.0, "risk": Advantage(0.1)}):
        with pytest.raises(TypeError, match="give either epsilon or risk; got"):
            calibrate_noise_multiplier(**given, **FULL)
        with pytest.raises(TypeError, match="give either epsilon or risk; got"):
            Plan.calibrate(clip=1.0, **given, **FULL)
    with pytest.raises(TypeError, match=r"risk must be a limit on an attack; got 0\.1\. Pass"):
        calibrate_noise_multiplier(risk=0.1, **FULL)
    with pytest.raises(TypeError, match="limit must be a real number; got"):
        Advantage("0.1")


def test_a_limit_out_of_reach_is_refused_with_the_best_that_is_possible():
    # A hundred thousand steps whose rounding alone costs more than this.
    run = {"sampler": Poisson(1000, 50), "num_steps": 100_000, "delta": 1e-5}
    match = (
        r"Advantage\(limit=1e-07\) at delta = 1e-05 is out of reach: even .* Take a larger limit"
    )
    with pytest.raises(ValueError, match=match):
        calibrate_noise_multiplier(risk=Advantage(1e-7), **run)


@pytest.mark.slow
def test_noise_against_riskcal():
    """riskcal reads advantage and trade-off curve off dp-accounting's distributions."""
    dpsgd = pytest.importorskip("riskcal.calibration.dpsgd", reason="pip install riskcal")
    run = {"sampler": Poisson(10_000, 200, 10_000), "num_steps": 200, "delta": 1e-5}
    theirs = {"sample_rate": 0.02, "num_steps": 200}
    noise, _ = calibrate_noise_multiplier(risk=Advantage(0.1), **run)
    assert dpsgd.get_advantage_for_dpsgd(noise, **theirs) == pytest.approx(0.1, rel=5e-3)
    ends = {"noise_min": 0.5 * noise, "noise_max": 2 * noise, "advantage_tol": 1e-4}
    found = dpsgd.find_noise_multiplier_for_advantage(0.1, **ends, **theirs)
    assert noise == pytest.approx(found, rel=5e-3)
    for false_positive_rate, limit in ((0.01, 0.05), (0.3, 0.5)):
        risk = TruePositiveRate(limit, false_positive_rate=false_positive_rate)
        noise, _ = calibrate_noise_multiplier(risk=risk, **run)
        missed = dpsgd.get_beta_for_dpsgd(noise, alpha=np.array([false_positive_rate]), **theirs)
        assert 1 - missed[0] == pytest.approx(limit, rel=1e-2)
