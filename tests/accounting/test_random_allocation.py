"""Random allocation: upper bounds that are close to independent computations."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from dp_accounting.dp_event import GaussianDpEvent

from dpoptax._dp_events import RandomAllocationDpEvent, TruncatedRandomAllocationDpEvent
from dpoptax.accounting import Ledger, _lognormal_sums, _random_allocation, epsilon, event_epsilon
from dpoptax.accounting._compose import compositions
from dpoptax.accounting._dp_accounting_compat import grid_losses
from dpoptax.accounting._epsilon import event_privacy_loss
from dpoptax.samplers import BallsInBins

GRID = 1e-3
cdf = scipy.stats.norm.cdf


def one_round(steps, noise, num_full=0):
    return _random_allocation.random_allocation(steps, noise, GRID, num_full=num_full)


def deltas(distribution, epsilons):
    """The profile of one round in both directions, removed and added."""
    return [one.deltas(np.asarray(epsilons)) for one in compositions([(distribution, 1)], GRID)]


def exact_deltas_of_two_steps(noise, at):
    """By quadrature over the first coordinate; the integral over the second has a closed form."""
    s = 1 / noise

    def removed(z):
        # E (Y - e^at)+ given X_1: the partial mean of X_2 above a threshold.
        x = math.exp(z * s - s * s / 2)
        threshold = 2 * math.exp(at) - x
        if threshold <= 0:
            return (x + 1) / 2 - math.exp(at)
        u = math.log(threshold) / s + s / 2
        return (x / 2 - math.exp(at)) * cdf(-u) + cdf(s - u) / 2

    def added(z):
        x = math.exp(z * s - s * s / 2)
        threshold = 2 * math.exp(-at) - x
        if threshold <= 0:
            return 0.0
        u = math.log(threshold) / s + s / 2
        return (1 - math.exp(at) * x / 2) * cdf(u) - math.exp(at) / 2 * cdf(u - s)

    def mean(function):
        weighed = lambda z: function(z) * scipy.stats.norm.pdf(z)  # noqa: E731
        return scipy.integrate.quad(weighed, -12, 12, epsabs=1e-14, epsrel=1e-9, limit=400)[0]

    return mean(removed), mean(added)


@pytest.mark.parametrize("noise", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("at", [0.05, 1.0, 3.0])
def test_a_round_of_two_steps_agrees_with_quadrature(noise, at):
    found = [float(one[0]) for one in deltas(one_round(2, noise), [at])]
    exact = exact_deltas_of_two_steps(noise, at)
    before = exact_deltas_of_two_steps(noise, 0.997 * at)
    for bound, at_least, at_most in zip(found, exact, before, strict=True):
        assert at_least <= bound * (1 + 1e-7) + 1e-12
        assert bound <= at_most + 1e-11


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_a_round_of_one_step_is_the_gaussian(noise):
    mu, at = 1 / noise, np.array([0.1, 1.0, 2.0])

    def exact(epsilons):  # Balle and Wang 2018, arXiv:1805.06530, theorem 8
        return cdf(mu / 2 - epsilons / mu) - np.exp(epsilons) * cdf(-mu / 2 - epsilons / mu)

    for found in deltas(one_round(1, noise), at):
        assert np.all(exact(at) <= found * (1 + 1e-7) + 1e-12)
        assert np.all(found <= exact(0.997 * at) + 1e-11)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("steps", "noise"), [(3, 1.1), pytest.param(50, 0.7, marks=pytest.mark.slow), (50, 1.5)]
)
def test_a_round_agrees_with_simulation(steps, noise):
    rng, at = np.random.default_rng(0), np.array([0.02, 0.3, 1.0])
    z = rng.standard_normal((400_000, steps)) / noise
    ratio = np.exp(z - 0.5 / noise**2).mean(axis=1)
    removed, added = deltas(one_round(steps, noise), at)
    # Under Q the removal's terms can be huge, so that they are drawn under P.
    z[:, 0] += 1 / noise**2
    under_p = np.exp(z - 0.5 / noise**2).mean(axis=1)
    for row, level in enumerate(at):
        for bound, terms in (
            (removed[row], np.maximum(1 - math.exp(level) / under_p, 0)),
            (added[row], np.maximum(1 - math.exp(level) * ratio, 0)),
        ):
            error = 5 * terms.std() / math.sqrt(len(terms)) + 1e-9
            assert terms.mean() - error <= bound <= terms.mean() * 1.005 + error


# The bounds of these runs, and what an accountant of another method finds (a plain FFT on a fine
# grid, to four digits).
@pytest.mark.parametrize(
    ("noise", "steps", "rounds", "delta", "reference"),
    [
        (1.1, 3, 1, 1e-5, 2.8651),
        (1.0, 10, 1, 1e-5, 2.1888),
        (0.8, 100, 10, 1e-6, 3.4349),
        (1.1, 469, 20, 1e-5, 0.8699),
        (2.0, 1000, 50, 1e-6, 0.4789),
    ],
)
def test_epsilon_is_a_tight_upper_bound(noise, steps, rounds, delta, reference):
    event = RandomAllocationDpEvent(GaussianDpEvent(noise), 1, steps)
    found = event_epsilon(dp_accounting.SelfComposedDpEvent(event, rounds), delta=delta)
    assert reference <= found + 5e-5
    assert found <= 1.01 * reference


@pytest.mark.slow
def test_a_finer_grid_only_tightens_the_bound(monkeypatch):
    at = np.array([0.1, 0.5])
    usual = deltas(one_round(37, 1.0), at)
    monkeypatch.setattr(_lognormal_sums, "SPACING", 1 / 8)
    for cached in (_lognormal_sums.sum_of, _random_allocation._losses):
        cached.cache_clear()
    coarse = deltas(one_round(37, 1.0), at)
    for cached in (_lognormal_sums.sum_of, _random_allocation._losses):
        cached.cache_clear()
    assert np.all(np.array(coarse) > np.array(usual))


@pytest.mark.slow
def test_more_noise_and_more_steps_cost_less():
    costs = [
        [event_epsilon(RandomAllocationDpEvent(GaussianDpEvent(s), 1, t), delta=1e-5) for t in ts]
        for s, ts in ((0.8, (2, 3, 8, 40)), (1.6, (2, 3, 8, 40)))
    ]
    assert np.all(np.diff(costs, axis=0) < 0)
    assert np.all(np.diff(costs, axis=1) < 0)


def test_the_probabilities_sum_to_one():
    for loss in _random_allocation._losses(100, 0.8, GRID, 2):
        assert loss.probabilities.sum() + loss.infinite == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("noise", [0.8, 2.0])
@pytest.mark.parametrize("angle", [0.0, 1.0, math.pi / 2, math.pi])
def test_replacing_an_example_costs_at_most_the_bound(noise, angle):
    """Two steps; the old example moves along one axis, the new one at an angle to it."""
    # The outputs are two planes. The ratio of the densities depends on the three numbers below.
    rng, s = np.random.default_rng(1), 1 / noise
    x = rng.standard_normal((400_000, 2, 2))
    old, new = np.array([1.0, 0.0]), np.array([math.cos(angle), math.sin(angle)])
    x[:, 0] += old * s  # by symmetry, the old example is in the first step

    def density(move):
        return np.exp(x @ move * s - s * s / 2).mean(axis=1)

    ratio = density(new) / density(old)
    at = np.array([0.1, 0.7, 2.0])
    replaced = _random_allocation.random_allocation_replacing(2, noise, GRID)
    bounds = deltas(replaced, at)[0]
    for level, bound in zip(at, bounds, strict=True):
        terms = np.maximum(1 - math.exp(level) * ratio, 0)
        assert terms.mean() - 5 * terms.std() / math.sqrt(len(terms)) <= bound


@pytest.mark.parametrize(
    ("steps", "noise"), [(2, 0.8), (10, 1.0), pytest.param(100, 0.3, marks=pytest.mark.slow)]
)
def test_the_probabilities_of_replacing_sum_to_one(steps, noise):
    # A profile with a kink at epsilon zero that is not convex would add up to a tenth per round.
    loss, _ = grid_losses(_random_allocation.random_allocation_replacing(steps, noise, 2e-3))
    assert loss.probabilities.min() >= 0
    assert loss.probabilities.sum() + loss.infinite == pytest.approx(1, abs=1e-7)


@pytest.mark.seconds
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("capacity", [pytest.param(20, marks=pytest.mark.slow), 200])
def test_a_round_with_very_little_noise_has_an_epsilon(relation, capacity):
    sampler = BallsInBins(200, 10, capacity)
    epsilons = [
        epsilon(
            sampler=sampler, noise_multiplier=noise, num_steps=10, delta=1e-6, relation=relation
        )
        for noise in (0.05, 0.2, 0.4)
    ]
    assert math.inf > epsilons[0] > epsilons[1] > epsilons[2] > 0


@pytest.mark.slow
def test_replacing_costs_no_more_than_without_amplification():
    for steps, noise in ((2, 0.5), (400, 1.0)):
        event = RandomAllocationDpEvent(GaussianDpEvent(noise), 1, steps)
        found = event_epsilon(event, delta=1e-5, relation="replace_one")
        assert found <= 1.001 * event_epsilon(GaussianDpEvent(noise / 2), delta=1e-5)


def test_several_steps_of_a_round_are_as_many_rounds():
    gaussian = GaussianDpEvent(1.0)
    several = event_epsilon(RandomAllocationDpEvent(gaussian, 3, 20), delta=1e-5)
    rounds = dp_accounting.SelfComposedDpEvent(RandomAllocationDpEvent(gaussian, 1, 6), 3)
    assert several == event_epsilon(rounds, delta=1e-5)
    every = event_epsilon(RandomAllocationDpEvent(gaussian, 4, 4), delta=1e-5)
    assert every == pytest.approx(event_epsilon(GaussianDpEvent(0.5), delta=1e-5), rel=1e-3)


@pytest.mark.slow
def test_two_of_four_steps_cost_at_most_the_bound():
    """By simulation of the exact pair: the mean over all pairs of steps."""
    rng, at = np.random.default_rng(2), np.array([0.3, 1.5])
    z = rng.standard_normal((400_000, 4))
    z[:, :2] += 1.0  # under P, by symmetry, in the first two steps
    pairs = list(itertools.combinations(range(4), 2))
    ratio = np.mean([np.exp(z[:, list(pair)].sum(axis=1) - 1.0) for pair in pairs], axis=0)
    loss = event_privacy_loss(RandomAllocationDpEvent(GaussianDpEvent(1.0), 2, 4), delta=1e-9)
    for level, bound in zip(at, loss.deltas(at), strict=True):
        terms = np.maximum(1 - math.exp(level) / ratio, 0)
        assert terms.mean() - 5 * terms.std() / math.sqrt(len(terms)) <= bound <= 1.5 * terms.mean()


@pytest.mark.parametrize("selected", [0, 5])
def test_a_round_with_impossible_numbers_is_refused(selected):
    with pytest.raises(ValueError, match="num_selected must be from 1 to num_steps; got"):
        event_epsilon(RandomAllocationDpEvent(GaussianDpEvent(1.0), selected, 4), delta=1e-5)


def exact_truncated_delta(size, steps, capacity, noise, at):
    """The mean over the steps of all others, which the adversary knows; two steps."""
    assert steps == 2
    total = 0.0
    for first in range(size):  # how many of the others are in the first step
        weight = scipy.stats.binom.pmf(first, size - 1, 0.5)
        moves = [2.0 if others >= capacity else 1.0 for others in (first, size - 1 - first)]
        total += weight * exact_delta_of_moves(moves, noise, at)
    return total


def exact_delta_of_moves(moves, noise, at):
    """Removed, two steps that the example moves by different amounts."""
    s, r = (move / noise for move in moves)

    def integrand(z):
        x = math.exp(z * s - s * s / 2)
        threshold = 2 * math.exp(at) - x
        if threshold <= 0:
            inner = (x + 1) / 2 - math.exp(at)
        else:
            u = math.log(threshold) / r + r / 2
            inner = (x / 2 - math.exp(at)) * cdf(-u) + cdf(r - u) / 2
        return inner * scipy.stats.norm.pdf(z)

    return scipy.integrate.quad(integrand, -12, 14, epsabs=1e-13, epsrel=1e-8, limit=400)[0]


@pytest.mark.seconds
@pytest.mark.parametrize("capacity", [3, 5, 7])
def test_full_batches_cost_at_least_what_an_adversary_learns(capacity):
    event = TruncatedRandomAllocationDpEvent(9, 2, capacity, 1.0)
    bounds = deltas(_random_allocation.truncated_random_allocation(event, GRID), [0.5, 2.0])[0]
    for at, bound in zip((0.5, 2.0), bounds, strict=True):
        exact = exact_truncated_delta(9, 2, capacity, 1.0, at)
        # The union bound on full batches is loose where they are common.
        assert exact <= bound <= 2.5 * exact


@pytest.mark.slow
def test_large_batches_cost_what_batches_without_a_limit_cost():
    run = {"noise_multiplier": 1.1, "num_steps": 469 * 20, "delta": 1e-5}
    costs = [epsilon(sampler=BallsInBins(60_000, 469, size), **run) for size in (224, 184, 176)]
    assert costs == sorted(costs)
    assert costs[1] < 1.001 * costs[0] < costs[2] < 1.02 * costs[0]


def test_a_round_that_has_begun_counts_and_noise_may_change_between_rounds():
    sampler = BallsInBins(1000, 10)
    run = {"sampler": sampler, "noise_multiplier": 1.0, "delta": 1e-5}
    assert epsilon(num_steps=11, **run) == epsilon(num_steps=20, **run)
    assert epsilon(num_steps=10, **run) < epsilon(num_steps=11, **run)


def test_a_ledger_of_random_allocation_is_read_back():
    sampler = BallsInBins(100, 4)
    ledger = Ledger(sampler, 1.0, delta=1e-5)
    ledger.charge_event(RandomAllocationDpEvent(GaussianDpEvent(2.0), 1, 5))
    again = Ledger.from_json(ledger.to_json(), sampler=sampler, clip=ledger.clip)
    assert again.epsilon() == ledger.epsilon() > 0
