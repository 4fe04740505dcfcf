"""Membership inference bounds: against reference values and the analytic Gaussian."""

import math

import dp_accounting
import numpy as np
import pytest
import scipy.stats

from dpoptax import Plan
from dpoptax.accounting import trade_off
from dpoptax.accounting._epsilon import event_privacy_loss
from dpoptax.samplers import Poisson


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "advantage", "rates"),
    [
        (1.1, 0.09296, {1e-6: 3.236e-6, 1e-4: 2.524e-4, 1e-3: 0.0021807, 0.1: 0.14784}),
        (0.7, 0.20482, {1e-5: 1.34e-4, 1e-3: 0.005966, 1e-2: 0.03839, 0.1: 0.227891}),
        (0.517, 0.41621, {1e-5: 0.0026169, 1e-3: 0.038987, 1e-2: 0.13988, 0.1: 0.44763}),
    ],
)  # fmt: skip
def test_what_an_attacker_can_do_against_reference_values(noise, advantage, rates):
    # The references are of batches without a limit, so the size is never exceeded.
    sampler = Poisson(60_000, 128, max_batch_size=260)
    plan = Plan(sampler=sampler, clip=2.0, noise_multiplier=noise, num_steps=9380, delta=1e-5)
    loss = plan.privacy_loss()
    assert trade_off.advantage(loss) == pytest.approx(advantage, rel=5e-3)
    found = trade_off.true_positive_rates(loss, list(rates))
    np.testing.assert_allclose(found, list(rates.values()), rtol=1e-2)


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_the_trade_off_curve_of_a_gaussian_is_the_analytic_one(mu):
    loss = event_privacy_loss(dp_accounting.GaussianDpEvent(1 / mu), delta=1e-8)
    rates = np.geomspace(1e-5, 0.9, 30)
    exact = scipy.stats.norm.cdf(scipy.stats.norm.ppf(rates) + mu)
    found = trade_off.true_positive_rates(loss, rates)
    assert np.all(found >= exact * (1 - 1e-9))
    np.testing.assert_allclose(found, exact, rtol=2e-3)
    assert trade_off.dominating_mu(loss) == pytest.approx(mu, rel=2e-3)
    assert trade_off.advantage(loss) == pytest.approx(
        2 * scipy.stats.norm.cdf(mu / 2) - 1, rel=1e-3
    )


def test_beliefs_are_odds_times_exp_epsilon():
    assert trade_off.posterior_belief(math.log(3), 0.5) == pytest.approx(0.75)
    assert trade_off.posterior_belief(math.log(9), 0.1) == pytest.approx(0.5)
    assert trade_off.posterior_belief(math.inf, 0.01) == 1.0
