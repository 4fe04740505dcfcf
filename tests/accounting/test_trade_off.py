"""Bounds on attacks: against reference values, the analytic Gaussian and simulated attacks."""

import dp_accounting
import numpy as np
import pytest
import scipy.special
import scipy.stats

from dpoptax import Plan
from dpoptax.accounting import trade_off
from dpoptax.accounting._epsilon import PrivacyLoss, event_privacy_loss
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


@pytest.mark.parametrize(("mu", "delta"), [(0.02, 1e-5), (0.2, 1e-6), (1.0, 1e-5), (3.0, 1e-4)])
def test_a_belief_exceeds_its_bound_with_probability_delta_at_most(mu, delta):
    loss = event_privacy_loss(dp_accounting.GaussianDpEvent(1 / mu), delta=delta)
    for prior in (0.5, 0.01):
        # The privacy loss of a Gaussian mechanism is N(mu^2 / 2, mu^2) if the example was used.
        def tail(belief, prior=prior):
            gain = scipy.special.logit(belief) - scipy.special.logit(prior)
            return scipy.stats.norm.sf((gain - mu**2 / 2) / mu)

        bound = trade_off.posterior_belief(loss, prior, delta)
        assert delta / 5 < tail(bound) <= delta
        # Epsilon at delta is no such bound.
        naive = scipy.special.expit(loss.epsilon(delta) + scipy.special.logit(prior))
        assert tail(naive) > 2 * delta


@pytest.mark.parametrize(("mu", "delta"), [(0.25, 0.1), (0.02, 1e-2), (1e-3, 1e-3)])
def test_a_belief_rises_even_if_epsilon_is_zero(mu, delta):
    loss = event_privacy_loss(dp_accounting.GaussianDpEvent(1 / mu), delta=delta)
    assert loss.epsilon(delta) == 0
    exact = scipy.special.expit(mu**2 / 2 + mu * scipy.stats.norm.isf(delta))
    assert exact <= trade_off.posterior_belief(loss, 0.5, delta) < 0.5 + 3 * (exact - 0.5)


def test_beliefs_without_noise_and_without_a_release():
    nothing, bare = PrivacyLoss(()), PrivacyLoss(None)
    assert trade_off.posterior_belief(nothing, 0.3, 1e-5) == pytest.approx(0.3)
    assert trade_off.posterior_belief(bare, 0.01, 1e-5) == 1.0
    assert trade_off.reconstruction_rates(bare, [0.01]) == [1.0]


def test_reconstruction_of_one_of_many_values_stays_within_the_bound():
    """The attacker knows that one of ten values was summed, and takes the likeliest one."""
    noise, values = 0.7, np.eye(10)
    rng = np.random.default_rng(0)
    truth = rng.integers(10, size=200_000)
    released = values[truth] + noise * rng.normal(size=(len(truth), 10))
    success = np.mean(np.argmax(released, axis=1) == truth)
    # Each value has norm one, and its absence is the neighbour.
    loss = event_privacy_loss(dp_accounting.GaussianDpEvent(noise), delta=1e-6)
    (bound,) = trade_off.reconstruction_rates(loss, [0.1])
    assert success <= bound
    # The bound is not far, and that of another baseline would fail.
    assert success > 0.85 * bound
    assert success > trade_off.reconstruction_rates(loss, [0.05])[0]
