"""Private search: its epsilon against exact mechanisms, published theorems and dp-accounting."""

import math

import attrs
import dp_accounting
import jax
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

from dpoptax.accounting import RandomRuns, event_epsilon, poisson_event, tuned
from dpoptax.accounting._epsilon import PrivacyLoss
from dpoptax.accounting._tuned import of_runs, search_loss
from dpoptax.samplers import BallsInBins, FixedSize

GAUSSIAN = dp_accounting.GaussianDpEvent(3.0)
SGD = poisson_event(noise_multiplier=1.1, sampling_rate=0.004, num_steps=200)
SHAPES = (0.0, 0.5, 1.0, 5.0, math.inf)
DELTA = 1e-5


@attrs.frozen
class Exact(PrivacyLoss):
    """The exact privacy loss of a mechanism with finitely many outputs, in both directions."""

    ours: np.ndarray = attrs.field(kw_only=True)
    theirs: np.ndarray = attrs.field(kw_only=True)

    def epsilon(self, delta):
        epsilons = np.linspace(0, 12, 4001)
        return float(epsilons[np.argmax(self.deltas(epsilons) <= delta)])

    def deltas(self, epsilons):
        return np.maximum(
            hockey_stick(self.ours, self.theirs, epsilons),
            hockey_stick(self.theirs, self.ours, epsilons),
        )


def hockey_stick(ours, theirs, epsilons):
    excess = ours[:, None] - np.exp(epsilons) * theirs[:, None]
    return np.maximum(excess, 0).sum(axis=0)


def best_of(run, runs):
    """The distribution of the best run, exactly; a search without runs has an output of its own."""
    numbers, weights = runs._table()
    below = np.append(0.0, np.cumsum(run))
    generating = np.sum(weights * below[:, None] ** numbers, axis=1)
    return np.append(np.diff(generating), generating[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_no_search_costs_more_than_stated(shape):
    """Every pair of neighbours on few outputs, which are ordered from the worst to the best."""
    rng = np.random.default_rng(0)
    epsilons = np.linspace(0, 6, 61)
    for mean in (1.5, 4.0, 20.0):
        runs = RandomRuns(mean, shape)
        for concentration in (0.3, 3.0):
            ours, theirs = 0.99 * rng.dirichlet(np.full(5, concentration), size=2) + 0.002
            theirs = 0.7 * ours + 0.3 * theirs
            # The last output is the best one. A rare good output is what a search makes likely.
            loss = Exact((), 0.0, ours=ours, theirs=theirs)
            bound = of_runs(loss, runs, delta=0.01)
            searched = best_of(ours, runs), best_of(theirs, runs)
            for pair in (searched, searched[::-1]):
                exact = hockey_stick(*pair, epsilons)
                assert np.all(exact <= bound.deltas(epsilons) + 1e-9)
            assert bound.deltas(np.array([bound.epsilon(0.01)])) <= 0.01 + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shift_is_needed(shape):
    """The power of the test above: with 0.7 of the shift, it would find too small a bound."""
    # The second output and the better third one move in opposite directions, and a search of many
    # runs returns the second one only if no run has the third one.
    better, ratio, mean = (0.05, math.e, 1000) if math.isfinite(shape) else (0.4, 1.1, 4)
    ours = np.array([0.99 - better, 0.01, better])
    theirs = np.array([0, 0.01 / ratio, better * ratio])
    theirs[0] = 1 - theirs.sum()
    runs = RandomRuns(mean, shape)
    bound = of_runs(Exact((), 0.0, ours=ours, theirs=theirs), runs, delta=1e-4)
    epsilons = np.linspace(0, 8, 801)
    exact = hockey_stick(best_of(ours, runs), best_of(theirs, runs), epsilons)
    assert np.all(exact <= bound.deltas(epsilons) + 1e-9)
    too_small = attrs.evolve(bound, shift=0.7 * bound.shift)
    assert np.any(exact > 1.1 * too_small.deltas(epsilons) + 1e-12)


def test_a_fixed_number_of_runs_would_break_the_bound():
    """The power of the test above: the best of exactly ten runs costs more than the bound."""
    loss = Exact((), 0.0, ours=np.array([0.99, 0.01]), theirs=np.array([0.98, 0.02]))
    bound = of_runs(loss, RandomRuns(10, 1.0), delta=1e-3)
    fixed = [np.array([below**100, 1 - below**100]) for below in (0.99, 0.98)]
    exact = hockey_stick(fixed[0], fixed[1], np.zeros(1))
    exact = max(exact, hockey_stick(fixed[1], fixed[0], np.full(1, bound.epsilon(1e-3))))
    assert exact > 100 * 1e-3


def test_one_run_costs_what_a_run_costs():
    for shape in (0.0, 1.0, 7.0):
        cost = tuned(GAUSSIAN, RandomRuns(1, shape), delta=DELTA)
        assert cost == pytest.approx(event_epsilon(GAUSSIAN, delta=DELTA), rel=1e-9)
    assert tuned(dp_accounting.NoOpDpEvent(), RandomRuns(5), delta=DELTA) == 0
    assert tuned(dp_accounting.NonPrivateDpEvent(), RandomRuns(5), delta=DELTA) == math.inf


@pytest.mark.parametrize("shape", SHAPES)
def test_more_runs_cost_more(shape):
    costs = [tuned(GAUSSIAN, RandomRuns(mean, shape), delta=DELTA) for mean in (1, 1.5, 4, 50)]
    assert costs[0] >= event_epsilon(GAUSSIAN, delta=DELTA) - 1e-12
    assert np.all(np.diff(costs) > 0)
    if shape == 1.0:  # Liu and Talwar: three times epsilon, however many runs
        assert 1.5 * costs[0] < costs[-1] < 3 * costs[0]


def renyi_of(event, orders):
    accountant = RdpAccountant(orders)
    accountant.compose(event)
    return accountant.rdp


def epsilon_of(orders, divergences):
    """Theorem 21 of arXiv:1905.09982, which is the conversion of dp-accounting."""
    costs = divergences + np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1)
    return max(costs.min(), 0)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 5.0])
def test_theorem_2_of_papernot_and_steinke_is_an_upper_bound_of_ours(shape):
    runs = RandomRuns(10, shape)
    orders = np.array([*np.arange(1.25, 11, 0.25), *range(11, 64)])
    one = renyi_of(SGD, orders)
    constant = np.min((1 - 1 / orders) * one - math.log(runs.halting_probability) / orders)
    theorem = one + (1 + shape) * constant + math.log(runs.mean) / (orders - 1)
    published = epsilon_of(orders, theorem)
    accountant = RdpAccountant(list(orders))
    accountant.compose(runs.event(SGD))
    assert accountant.get_epsilon(DELTA) == pytest.approx(published, rel=1e-3)
    assert 0.3 * published < tuned(SGD, runs, delta=DELTA) < published


@pytest.mark.parametrize("mean", [3, 100])
def test_theorem_6_of_papernot_and_steinke_bounds_a_poisson_number_of_runs(mean):
    orders = np.array([*np.arange(1.25, 11, 0.25), *range(11, 64)])
    one = renyi_of(GAUSSIAN, orders)
    epsilons = np.log1p(1 / (orders - 1))
    # The exact delta of one Gaussian, where dp-accounting converts the Rényi divergences.
    from scipy.special import ndtr

    deltas = ndtr(1 / 6 - 3 * epsilons) - np.exp(epsilons) * ndtr(-1 / 6 - 3 * epsilons)
    published = epsilon_of(orders, one + mean * deltas + math.log(mean) / (orders - 1))
    found = tuned(GAUSSIAN, RandomRuns(mean, math.inf), delta=DELTA)
    if mean == 3:
        assert found < published  # ours, from the privacy loss
    else:
        assert published < found < 1.4 * published  # theirs, from Rényi divergences
        assert found < search_loss(GAUSSIAN, RandomRuns(mean, math.inf), delta=DELTA).epsilon(DELTA)


@pytest.mark.slow
def test_samplers_and_relations_without_renyi_divergences():
    runs = RandomRuns(5, math.inf)
    for sampler in (FixedSize(1000, 20), BallsInBins(1000, 50)):
        relation = sampler.relation
        event = sampler.event(2.0, 50, relation)
        one = event_epsilon(event, delta=DELTA, relation=relation)
        assert one < tuned(event, runs, delta=DELTA, relation=relation) < 5 * one
    single = event_epsilon(SGD, delta=DELTA, relation="replace_one")
    assert tuned(SGD, runs, delta=DELTA, relation="replace_one") > single


def test_candidates_that_differ_cost_as_the_worst_one():
    runs = RandomRuns(4)
    other = dp_accounting.GaussianDpEvent(5.0)
    together = tuned([other, GAUSSIAN], runs, delta=DELTA)
    apart = [tuned(event, runs, delta=DELTA) for event in (other, GAUSSIAN)]
    assert max(apart) <= together < max(apart) + 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_of_runs_have_the_stated_distribution(shape):
    runs = RandomRuns(6, shape)
    numbers, probabilities = runs._table()
    assert np.sum(numbers * probabilities) == pytest.approx(6, rel=1e-9)
    # Against the ratio of neighbouring probabilities in definition 1.
    if math.isfinite(shape):
        ratios = probabilities[1:20] / probabilities[:19]
        expected = (1 - runs.halting_probability) * (numbers[:19] + shape) / (numbers[:19] + 1)
        np.testing.assert_allclose(ratios, expected, rtol=1e-9)
    drawn = [runs.draw(key) for key in jax.random.split(jax.random.key(3), 400)]
    deviation = math.sqrt(np.sum(numbers**2 * probabilities) - 36)
    assert abs(np.mean(drawn) - 6) < 4 * deviation / 20
    assert min(drawn) >= (0 if math.isinf(shape) else 1)
    assert drawn[0] == runs.draw(jax.random.split(jax.random.key(3), 400)[0])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.5,), "expected number of runs, from 1"),
        ((1e6,), "from 1 to 1000"),
        ((math.nan,), "got nan"),
        ((3, -0.5), "shape must be from 0"),
        ((3, 1e3), "shape must be from 0 to 100"),
    ],
)
def test_bad_distributions_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        RandomRuns(*arguments)


@pytest.mark.untyped
def test_a_fixed_number_of_runs_and_other_events_are_refused():
    with pytest.raises(TypeError, match="A fixed number of runs has no such bound"):
        tuned(SGD, 10, delta=DELTA)
    with pytest.raises(TypeError, match="expected the event of a run"):
        tuned([], RandomRuns(3), delta=DELTA)
    with pytest.raises(TypeError, match="typed PRNG key"):
        RandomRuns(3).draw(0)
