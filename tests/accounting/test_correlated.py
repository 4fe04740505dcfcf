"""Correlated noise: its epsilon bounds exact values, and what has no proof is refused by name."""

import copy
import itertools

import attrs
import dp_accounting
import numpy as np
import pytest
import scipy.stats

from dpoptax import Plan, Report
from dpoptax.accounting import Ledger, calibrate_noise_multiplier, epsilon, event_epsilon
from dpoptax.accounting._correlated import correlated_event
from dpoptax.accounting._epsilon import event_privacy_loss, run_event
from dpoptax.accounting._event_json import decode_event, encode_event
from dpoptax.clipping import QuantileClip
from dpoptax.mechanisms import Correlated, DiscreteGaussian, Gaussian
from dpoptax.mechanisms.strategies import (
    BandedInverse,
    BandedToeplitz,
    Cyclic,
    DenseStrategy,
    OncePerRound,
    Separated,
    sensitivity,
)
from dpoptax.relations import parse_relation
from dpoptax.samplers import (
    BallsInBins,
    CyclicPoisson,
    FixedSize,
    MinSeparated,
    Poisson,
    PoissonSchedule,
    RandomCyclicPoisson,
    Shuffled,
    UserPoisson,
)
from dpoptax.schedules import Schedule

BANDED = BandedToeplitz((1.0, 0.6, 0.3), 40)
# Whole groups fit into a batch, so that each step is cheap to account.
CYCLIC = CyclicPoisson(100, 5, 4, max_batch_size=25)
RUN = {"sampler": CYCLIC, "noise_multiplier": 1.2, "num_steps": 40, "delta": 1e-4}


def deltas_of_mixtures(first, second, noise, epsilons):
    """Exact hockey-stick divergences of two mixtures of points in the plane, by quadrature.

    A mixture is a list of probabilities and points.
    """
    grid = np.arange(-9.0, 11.0, 0.03) * noise
    x, y = np.meshgrid(grid, grid, indexing="ij")

    def density(mixture):
        return sum(
            probability
            * scipy.stats.norm.pdf(x, point[0], noise)
            * scipy.stats.norm.pdf(y, point[1], noise)
            for probability, point in mixture
        )

    one, other = density(first), density(second)
    cell = (0.03 * noise) ** 2
    return np.array(
        [
            max(
                np.maximum(one - np.exp(value) * other, 0).sum(),
                np.maximum(other - np.exp(value) * one, 0).sum(),
            )
            * cell
            for value in epsilons
        ]
    )


def turns_of_two_bands(batches):
    """The mixture of `C x` of four steps, from the laws of the sums of steps 0 and 2.

    The columns of these steps do not overlap, so two coordinates along them say all.
    """
    matrix = BandedToeplitz((1.0, 0.8), 4).matrix()
    assert matrix[:, 0] @ matrix[:, 2] == 0
    norms = np.linalg.norm(matrix[:, [0, 2]], axis=0)
    return [
        (p * q, (norms[0] * first, norms[1] * second))
        for (p, first), (q, second) in itertools.product(batches, batches)
    ]


@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_the_loss_of_two_turns_bounds_the_exact_one_and_is_close(noise):
    rate = 0.3
    sampler = CyclicPoisson(20, 20 / 2 * rate, 2)
    event = run_event(sampler, noise, 4, None, Correlated(BandedToeplitz((1.0, 0.8), 4)))
    epsilons = np.array([0.1, 0.5, 1.0, 2.0])
    found = event_privacy_loss(event, delta=1e-9, relation="replace_special").deltas(epsilons)
    there = turns_of_two_bands([(1 - rate, 0.0), (rate, 1.0)])
    exact = deltas_of_mixtures(there, [(1.0, (0.0, 0.0))], noise, epsilons)
    assert (exact <= found + 1e-6).all()
    # The second turn has one step only, which costs less; the bound does not use it.
    assert (found <= 1.5 * exact + 1e-4).all()


def test_batches_that_are_cut_are_covered():
    """Two examples in a group, of which one has room: the second one may displace the first."""
    noise, rate = 1.0, 0.5
    sampler = CyclicPoisson(4, 2 * rate, 2, max_batch_size=1)
    event = run_event(sampler, noise, 4, None, Correlated(BandedToeplitz((1.0, 0.8), 4)))
    epsilons = np.array([0.1, 0.5, 1.0, 2.0, 3.0])
    found = event_privacy_loss(event, delta=1e-9, relation="replace_special").deltas(epsilons)
    nobody, one = (1 - rate) ** 2, (1 - (1 - rate) ** 2) / 2
    for other in (1.0, -1.0):
        # This example, the other one, or nobody is in the batch.
        there = turns_of_two_bands([(nobody, 0.0), (one, 1.0), (one, other)])
        special = turns_of_two_bands([(nobody, 0.0), (one, 0.0), (one, other)])
        exact = deltas_of_mixtures(there, special, noise, epsilons)
        assert (exact <= found + 1e-6).all()


def test_cyclic_batches_cost_what_they_cost_with_independent_noise():
    correlated = epsilon(**RUN, mechanism=Correlated(BANDED))
    assert correlated == epsilon(**RUN)
    replaced = epsilon(**RUN, mechanism=Correlated(BANDED), relation="replace_one")
    assert replaced == epsilon(**RUN, relation="replace_one") > correlated


def test_a_group_of_examples_costs_more_than_in_independent_noise():
    """Its members may have different turns, so that the noise of their sums is correlated."""
    run = RUN | {"num_steps": 12}
    correlated = epsilon(**run, mechanism=Correlated(BANDED), group_size=2)
    assert correlated > epsilon(**run, group_size=2) > epsilon(**run)
    # Never more than without sampling.
    moves = 2 * sensitivity(BANDED, Separated(4), num_steps=12)
    event = dp_accounting.GaussianDpEvent(1.2 / moves)
    assert correlated <= event_epsilon(event, delta=1e-4) * 1.001
    assert correlated < epsilon(**run, mechanism=Correlated(BANDED), group_size=4) < np.inf


def test_a_group_more_may_displace_others_of_a_full_group():
    sampler = RandomCyclicPoisson(100, 10, 4)
    moves = sensitivity(BANDED, Cyclic(4), num_steps=12)
    for relation, factor in (("replace_special", 1), ("add_or_remove_one", 2)):
        event = correlated_event(BANDED, sampler, 3.0, 12, parse_relation(relation))
        assert event.for_groups == dp_accounting.GaussianDpEvent(3.0 / (factor * moves))


@pytest.mark.parametrize("sampler", [BallsInBins(100, 10, 16), MinSeparated(100, 10, 4, 16)])
def test_full_batches_of_all_rounds_are_counted(sampler):
    full = scipy.stats.binom.sf(15, 99, 1 / 10)
    rounds = sampler.participation(40).max_count
    assert 1 - (1 - full) ** rounds <= sampler.participation(40).crowded <= rounds * full * 1.001


@pytest.mark.parametrize("relation", ["replace_special", "replace_one"])
def test_shuffled_batches_are_one_gaussian(relation):
    strategy = BandedInverse.square_root(4, 60)
    sampler = Shuffled(100, 10)
    run = {"sampler": sampler, "noise_multiplier": 3.0, "delta": 1e-4, "relation": relation}
    found = epsilon(**run, num_steps=60, mechanism=Correlated(strategy))
    moves = sensitivity(strategy, OncePerRound(10)) * (2 if relation == "replace_one" else 1)
    event = dp_accounting.GaussianDpEvent(3.0 / moves)
    assert found == pytest.approx(event_epsilon(event, delta=1e-4), rel=1e-3)
    # Independent noise of the same multiplier costs less: its sums have more noise.
    assert found > epsilon(**run, num_steps=60)
    by_steps = [
        epsilon(**run, num_steps=steps, mechanism=Correlated(strategy)) for steps in (5, 20, 50)
    ]
    assert [0.0, *by_steps, found] == sorted({0.0, *by_steps, found})


def test_balls_in_bins_pay_for_displaced_examples():
    strategy = BandedInverse.square_root(4, 40)
    mechanism = Correlated(strategy)

    def cost(size, relation=None):
        sampler = BallsInBins(100, 10, max_batch_size=size)
        run = {"sampler": sampler, "noise_multiplier": 5.0, "num_steps": 40, "delta": 1e-4}
        return epsilon(**run, mechanism=mechanism, relation=relation)

    whole = cost(100)
    assert whole == pytest.approx(cost(20, "replace_special"), rel=1e-6)
    assert whole < cost(20) < cost(15) < 2.2 * whole
    assert cost(14, "replace_special") == whole


@pytest.mark.parametrize(
    "sampler",
    [
        Poisson(100, 10),
        CYCLIC,
        FixedSize(100, 10),
        Shuffled(100, 10),
        BallsInBins(100, 10),
        UserPoisson(range(100), 10, max_examples_per_user=1),
        PoissonSchedule([(Poisson(100, 10), 40)]),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_one_band_costs_what_independent_noise_costs(sampler):
    run = RUN | {"sampler": sampler}
    diagonal = DenseStrategy(np.diag(np.linspace(1.0, 0.5, 40)))
    for strategy in (BandedToeplitz((3.0,), 40), diagonal):
        assert epsilon(**run, mechanism=Correlated(strategy)) == epsilon(**run)


def test_epsilon_is_monotone():
    def cost(**changes):
        return epsilon(**(RUN | {"mechanism": Correlated(BANDED)} | changes))

    by_steps = [cost(num_steps=steps) for steps in (0, 1, 5, 17, 40)]
    assert by_steps == sorted(by_steps)
    assert by_steps[0] == 0
    by_noise = [cost(noise_multiplier=noise) for noise in (0, 0.5, 1.0, 2.0)]
    assert by_noise == sorted(by_noise, reverse=True)
    assert by_noise[0] == np.inf
    # More groups, of as many bands: a higher rate.
    samplers = [CyclicPoisson(100, 5, groups, max_batch_size=34) for groups in (3, 6, 12)]
    by_groups = [cost(sampler=sampler) for sampler in samplers]
    assert by_groups == sorted(by_groups)
    assert len(set(by_groups)) == 3


def test_calibration_counts_the_strategy():
    sampler = Shuffled(100, 10)
    target = {"epsilon": 3.0, "delta": 1e-4, "sampler": sampler, "num_steps": 60}
    mechanism = Correlated(BandedInverse.square_root(4, 60))
    noise, spent = calibrate_noise_multiplier(**target, mechanism=mechanism)
    assert 2.99 < spent <= 3.0
    assert noise > calibrate_noise_multiplier(**target).noise_multiplier
    plan = Plan.calibrate(
        sampler=sampler, clip=1.0, num_steps=60, epsilon=3.0, delta=1e-4, mechanism=mechanism
    )
    assert plan.noise_multiplier == noise
    assert plan.epsilon() == spent
    ledger = plan.ledger()
    ledger.charge(plan.noise_multiplier, 60)
    assert ledger.epsilon() == spent


@attrs.frozen(init=False)
class OwnCyclic(CyclicPoisson):
    """Draws other batches than its base class, and inherits what is said about those."""

    def sample(self, state):
        return CyclicPoisson.sample(self, state._replace(step=state.step * 0))


class OwnGroups(RandomCyclicPoisson):
    """Makes other groups than its base class, and inherits what is said about those."""

    def init(self, key, step=0):
        return RandomCyclicPoisson.init(self, key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": Poisson(100, 5)}, "nothing is proven .* under Poisson.*CyclicPoisson"),
        ({"sampler": FixedSize(100, 5)}, "nothing is proven .* under FixedSize"),
        ({"sampler": OwnCyclic(100, 5, 4)}, "nothing is proven .* under OwnCyclic"),
        ({"sampler": OwnGroups(100, 5, 4)}, "nothing is proven .* under OwnGroups"),
        (
            {"sampler": PoissonSchedule([(Poisson(100, 5), 40)])},
            "nothing is proven .* under PoissonSchedule",
        ),
        (
            {"sampler": UserPoisson(range(100), 10, max_examples_per_user=1)},
            "nothing is proven .* under UserPoisson",
        ),
        ({"sampler": CyclicPoisson(100, 5, 2)}, "num_groups=2 .* 3 bands in BandedToeplitz"),
        ({"num_steps": 41}, "covers 40 steps; got a run of 41|at most 40 steps"),
        (
            {"noise_multiplier": Schedule((1.0, 2.0), (20, 20))},
            "one noise_multiplier|constant noise_multiplier",
        ),
        ({"relation": "add_or_remove_one"}, "groups by index have no guarantee"),
        (
            {"sampler": Shuffled(100, 10), "relation": "add_or_remove_one"},
            "shuffled batches have no guarantee",
        ),
        (
            {"mechanism": Correlated(BandedInverse.square_root(3, 40))},
            "40 bands in BandedInverse",
        ),
    ],
)
def test_what_has_no_proof_is_refused_by_name(changes, message):
    run = RUN | {"mechanism": Correlated(BANDED)} | changes
    with pytest.raises(ValueError, match=message):
        epsilon(**run)
    if "relation" not in changes:
        with pytest.raises(ValueError, match=message):
            Plan(clip=1.0, **run)


def test_clip_bounds_that_change_are_refused():
    for clip in (Schedule((1.0, 0.5), (20, 20)), QuantileClip()):
        with pytest.raises((ValueError, TypeError), match=r"l2_clip|clip bound|constant bound"):
            Plan(clip=clip, **RUN, mechanism=Correlated(BANDED))
        with pytest.raises(ValueError, match="one clip bound"):
            Ledger(CYCLIC, clip, delta=1e-4, mechanism=Correlated(BANDED))


def ledger(strategy=BANDED, sampler=CYCLIC):
    return Ledger(sampler, 1.0, delta=1e-4, mechanism=Correlated(strategy))


def test_a_ledger_counts_whole_runs_and_restarts():
    strategy, sampler = BandedInverse.square_root(4, 40), Shuffled(100, 10)
    book = ledger(strategy, sampler)
    for _ in range(3):
        book.charge(5.0)
    book.charge(5.0, 37)
    run = {"sampler": sampler, "noise_multiplier": 5.0, "delta": 1e-4}
    run["mechanism"] = Correlated(strategy)
    assert book.epsilon() == epsilon(**run, num_steps=40)
    # A run that starts over has new noise: both runs are counted, each with its own correlations.
    book.restart()
    book.charge(5.0, 40)
    moves = sensitivity(strategy, OncePerRound(10)) * np.sqrt(2)
    twice = event_epsilon(dp_accounting.GaussianDpEvent(5.0 / moves), delta=1e-4)
    assert book.epsilon() == pytest.approx(twice, rel=1e-3)
    assert copy.copy(book).epsilon() == book.epsilon()


def test_a_ledger_refuses_steps_beyond_the_strategy_before_it_counts_them():
    book = ledger()
    book.charge(1.2, 38)
    assert book.epsilon() <= book.epsilon_bound() <= epsilon(**RUN)
    with pytest.raises(ValueError, match="covers 40 steps"):
        book.charge(1.2, 3)
    with pytest.raises(ValueError, match=r"one noise_multiplier|constant noise_multiplier"):
        book.charge(1.3)
    assert book.num_steps == 38
    book.charge(1.2, 2)
    assert book.epsilon_bound() == book.epsilon() == epsilon(**RUN)
    book.restart()
    book.charge(1.3, 40)


def test_a_ledger_continues_under_its_own_strategy_only():
    book = ledger()
    book.charge(1.2, 10)
    book.restart()
    book.charge(1.2, 5)
    text = book.to_json()
    run = {"sampler": CYCLIC, "clip": 1.0}
    read = Ledger.from_json(text, **run, mechanism=Correlated(BANDED))
    assert read.epsilon() == book.epsilon()
    assert read.to_json() == text
    for mechanism, message in [
        (Gaussian(), "strategy BandedToeplitz .* IndependentNoise"),
        (Correlated(BandedToeplitz((1.0, 0.6, 0.2), 40)), "with other numbers"),
        (Correlated(BandedToeplitz((1.0, 0.6, 0.3), 41)), "num_steps 41"),
    ]:
        with pytest.raises(ValueError, match=message):
            Ledger.from_json(text, **run, mechanism=mechanism)
    # Independent noise is the same to a ledger, whoever draws it.
    independent = Ledger(CYCLIC, 1.0, delta=1e-4)
    independent.charge(1.2, 10)
    Ledger.from_json(independent.to_json(), **run, mechanism=DiscreteGaussian())
    with pytest.raises(ValueError, match="IndependentNoise, but"):
        Ledger.from_json(independent.to_json(), **run, mechanism=Correlated(BANDED))


def test_a_ledger_without_the_mechanism_has_no_report():
    """The ledger of a careless loop counts independent noise, so that the report must not hold."""
    plan = Plan(clip=1.0, **RUN, mechanism=Correlated(BANDED))
    careless = Ledger(plan.sampler, plan.clip, delta=plan.delta)
    careless.charge(plan.noise_multiplier, 40)
    of_run = {"steps_done": 40, "steps_planned": 40, "noise_multiplier": 1.2}
    with pytest.raises(ValueError, match="the ledger counted independent noise, but"):
        Report.from_ledger(careless, **of_run, mechanism=plan.mechanism)
    with pytest.raises(ValueError, match="the mechanism draws independent noise"):
        Report.from_ledger(plan.ledger(), **of_run, mechanism=Gaussian())


def test_events_survive_json_and_mean_the_same_to_dp_accounting():
    for strategy, sampler in ((BANDED, CYCLIC), (BANDED, BallsInBins(100, 4, max_batch_size=40))):
        relation = parse_relation(sampler.relation)
        event = correlated_event(strategy, sampler, 1.2, 40, relation)
        read = decode_event(encode_event(event))
        expected = event_epsilon(event, delta=1e-4, relation=relation)
        assert event_epsilon(read, delta=1e-4, relation=relation) == expected
        groups = {"delta": 1e-4, "relation": relation, "group_size": 2}
        assert event_epsilon(read, **groups) == event_epsilon(event, **groups)
    event = correlated_event(
        BANDED, CYCLIC, 1.2, 40, dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    )
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    assert accountant.compose(event).get_epsilon(1e-4) > event_epsilon(event, delta=1e-4)


def test_a_plan_survives_json():
    plan = Plan(clip=1.0, **RUN, mechanism=Correlated(BANDED))
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert read.epsilon() == plan.epsilon()
    assert plan.replace(num_steps=10).epsilon() < plan.epsilon()
    with pytest.raises(ValueError, match=r"covers 40 steps|at most 40 steps"):
        plan.replace(num_steps=41)
    with pytest.raises(ValueError, match="covers 40 steps"):
        plan.epsilon(num_steps=41)
