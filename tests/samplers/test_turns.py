"""Samplers whose examples take turns: when they do, and what one example more changes."""

import itertools
import math

import dp_accounting
import jax
import numpy as np
import pytest
import scipy.stats
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from inclusion import LEVEL, inclusions, pair_p_value, single_p_value, size_p_value

from dpoptax._dp_events import KnownBranchDpEvent, RandomAllocationDpEvent
from dpoptax.accounting import Ledger, RdpFilter, epsilon, event_epsilon
from dpoptax.accounting._compose import compositions
from dpoptax.accounting._step_pld import step_distribution
from dpoptax.relations import parse_relation
from dpoptax.samplers import BallsInBins, CyclicPoisson, MinSeparated, RandomCyclicPoisson, Shuffled
from dpoptax.schedules import Schedule


def runs(sampler, num_runs, num_steps, seed=0):
    """Inclusion tables of runs with different keys, (num_runs, num_steps, num_examples)."""

    def run(key):
        step = lambda state, _: sampler.sample(state)  # noqa: E731
        return jax.lax.scan(step, sampler.init(key), None, length=num_steps)[1]

    keys = jax.random.split(jax.random.key(seed), num_runs)
    batches = jax.jit(jax.vmap(run))(keys)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), batches)
    return inclusions(flat, sampler.num_examples).reshape(num_runs, num_steps, -1)


@pytest.mark.seconds
def test_separated_turns_are_apart_uniform_and_independent():
    sampler = MinSeparated(num_examples=40, steps_per_round=5, min_separation=3)
    table = runs(sampler, 2_000, 13)
    for step in (0, 7):  # over independent runs
        assert size_p_value(table[:, step], 1 / 5) > LEVEL
        assert single_p_value(table[:, step], 1 / 5) > LEVEL
        assert pair_p_value(table[:, step], 1 / 5) > LEVEL
    # From one turn to the next: five steps, plus the difference of two choices among three.
    turns = [np.flatnonzero(column) for run in table for column in run.T]
    assert max(map(len, turns)) == sampler.participation(13).max_count == 3
    gaps = np.concatenate([np.diff(steps) for steps in turns])
    assert set(gaps) == {3, 4, 5, 6, 7}
    # From turns at step 5, the next one is seen in any case.
    seen = np.concatenate([np.diff(steps)[steps[:-1] == 5] for steps in turns])
    counts = np.bincount(seen, minlength=8)[3:]
    assert scipy.stats.chisquare(counts, len(seen) * np.array([1, 2, 3, 2, 1]) / 9).pvalue > LEVEL


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_number_of_turns_is_the_largest_that_can_occur(steps):
    for separation in range(1, steps + 1):
        sampler = MinSeparated(30, steps, separation)
        for length in range(1, 4 * steps + 2):
            # A round has a turn in the run if one of its choices is in it.
            rounds = [
                sum(
                    begin + steps * number < length
                    and begin + steps * number + sampler.num_choices > 0
                    for number in range(-1, 5)
                )
                for begin in range(steps)
            ]
            assert sampler.participation(length).max_count == max(rounds)


@pytest.mark.slow
def test_so_many_turns_occur():
    sampler = MinSeparated(30, 3, 2)
    table = runs(sampler, 300, 10)
    for length in range(1, 11):
        most = table[:, :length].sum(axis=1).max()
        assert most == sampler.participation(length).max_count <= -(-length // 2)


def test_separated_turns_cost_a_random_allocation_per_round():
    run = {"noise_multiplier": 1.1, "delta": 1e-5}

    def cost(steps, **changes):
        sampler = MinSeparated(**({"num_examples": 100, "steps_per_round": 10} | changes))
        return epsilon(sampler=sampler, num_steps=steps, **run)

    def allocation(choices, rounds):
        gaussian = GaussianDpEvent(1.1)
        event = RandomAllocationDpEvent(gaussian, 1, choices) if choices > 1 else gaussian
        return event_epsilon(dp_accounting.SelfComposedDpEvent(event, rounds), delta=1e-5)

    # Capacities that never overflow, so that the numbers agree exactly.
    assert cost(10, min_separation=10, max_batch_size=100) == allocation(1, 1)
    assert cost(11, min_separation=10, max_batch_size=100) == allocation(1, 2)
    assert cost(4, min_separation=4, max_batch_size=100) == allocation(7, 1)
    assert cost(14, min_separation=4, max_batch_size=100) == allocation(7, 2)
    assert cost(15, min_separation=4, max_batch_size=100) == allocation(7, 3)
    costs = [cost(20, min_separation=b, max_batch_size=100) for b in (1, 4, 7, 9)]
    assert costs == sorted(costs)
    full = cost(14, min_separation=4, max_batch_size=12)
    assert allocation(7, 2) < full


def test_batches_that_are_full_in_every_round_are_counted():
    # Each example takes part in every second step. So the others fill the same batch each time.
    num_examples, num_rounds, largest, noise, delta = 1002, 100, 550, 5.0, 1e-5
    sampler = MinSeparated(num_examples, 2, 2, largest)
    claimed = epsilon(
        sampler=sampler, noise_multiplier=noise, num_steps=2 * num_rounds, delta=delta
    )
    # The others contribute -1 and the example contributes 1 in the first step of every round. What
    # the means of the sums tell depends on how many others are in that step.
    others = np.arange(400, 601)
    weights = scipy.stats.binom.pmf(others, num_examples - 1, 0.5)
    is_full = others >= largest
    moves = np.where(is_full, 2 * largest / (others + 1), 1.0)
    without = np.stack([-np.minimum(others, largest), others - num_examples + 1], axis=1)
    deviation = noise / math.sqrt(num_rounds)

    def log_density(outputs, means):
        squares = ((outputs[:, None] - means) ** 2).sum(axis=-1)
        return np.logaddexp.reduce(np.log(weights) - squares / 2 / deviation**2, axis=1)

    # Only outputs of full batches, for a lower bound of delta.
    with_one = without + np.stack([moves, 0 * moves], axis=1)
    rng = np.random.default_rng(0)
    share = weights[is_full].sum()
    drawn = with_one[is_full][rng.choice(is_full.sum(), 4000, p=weights[is_full] / share)]
    outputs = drawn + deviation * rng.normal(size=(4000, 2))
    losses = log_density(outputs, with_one) - log_density(outputs, without)
    assert share * np.clip(1 - np.exp(10.1 - losses), 0, None).mean() > 10 * delta
    assert share * np.clip(1 - np.exp(claimed - losses), 0, None).mean() < delta


def test_the_events_of_turns_are_read_back_and_filtered():
    for sampler in (MinSeparated(400, 10, 4, 60), RandomCyclicPoisson(400, 10, 4)):
        ledger = Ledger(sampler, 1.0, delta=1e-5)
        ledger.charge(Schedule((4.0, 5.0), (10, 10)), 20)
        again = Ledger.from_json(ledger.to_json(), sampler=sampler, clip=ledger.clip)
        assert again.epsilon() == ledger.epsilon() > 0
        budget = RdpFilter(epsilon=50.0, delta=1e-5)
        budget.charge(sampler.event(4.0, 20))
        assert 50 > budget.spent() > ledger.epsilon()


@pytest.mark.seconds
def test_random_groups_are_kept_and_independent():
    sampler = RandomCyclicPoisson(num_examples=40, expected_batch_size=5, num_groups=4)
    table = runs(sampler, 2_000, 8)
    for step in (0, 5):  # over independent runs, the groups are drawn as well
        assert size_p_value(table[:, step], 5 / 40) > LEVEL
        assert single_p_value(table[:, step], 5 / 40) > LEVEL
        assert pair_p_value(table[:, step], 5 / 40) > LEVEL
    # In one run an example joins steps of one group only, each of them independently.
    turns = table.reshape(2_000, 2, 4, 40).sum(axis=1)
    assert np.all((turns > 0).sum(axis=1) <= 1)
    twice, rate = (turns == 2).sum(), sampler.sampling_rate
    trials = 2_000 * 40
    assert abs(twice - trials * rate**2) < 4 * math.sqrt(trials * rate**2)


@pytest.mark.slow
def test_small_batches_of_a_group_are_drawn_again():
    table = runs(RandomCyclicPoisson(5, 2.5, 1, 2), 4_000, 1)[:, 0]
    # All places have examples here, so that the size is binomial below the limit.
    expected = scipy.stats.binom.pmf(range(3), 5, 0.5)
    observed = np.bincount(table.sum(axis=1), minlength=3)
    assert scipy.stats.chisquare(observed, 4_000 * expected / expected.sum()).pvalue > LEVEL
    assert single_p_value(table, table.mean()) > LEVEL


def density(outputs, moves, num_places, rate, largest):
    """Of a noisy sum over a batch of places, of which only the first have examples."""
    total, fits = np.zeros_like(outputs), 0.0
    for joins in itertools.product([False, True], repeat=num_places):
        size = sum(joins)
        if size <= largest:
            weight = rate**size * (1 - rate) ** (num_places - size)
            mean = float(np.dot(moves, joins[: len(moves)]))
            total += weight * scipy.stats.norm.pdf(outputs, mean, 1.0)
            fits += weight
    return total / fits


@pytest.mark.parametrize(("places", "most"), [(5, 2), (6, 5)])
@pytest.mark.parametrize("other_adds", [-1.0, 1.0, 6.0])
def test_a_small_batch_of_a_group_costs_no_more_than_a_poisson_batch(places, most, other_adds):
    rate, others = 0.4, [other_adds] * 3
    outputs = np.linspace(-10, 40, 20_001)
    first, second = (density(outputs, m, places, rate, most) for m in ([*others, 1.0], others))
    loss = step_distribution(
        PoissonSampledDpEvent(rate, GaussianDpEvent(1.0)),
        parse_relation("add_or_remove_one"),
        1e-3,
    )
    removed, added = compositions([(loss, 1)], 1e-3)
    for at in (-0.3, 0.1, 0.3, 1.0):
        for pair, bound in (((first, second), removed), ((second, first), added)):
            exact = np.maximum(pair[0] - math.exp(at) * pair[1], 0).sum() * (
                outputs[1] - outputs[0]
            )
            assert exact <= bound.deltas(np.array([at]))[0] + 1e-9


def test_random_groups_cost_what_fixed_groups_cost_and_hold_for_examples_that_are_added():
    run = {"noise_multiplier": 1.1, "num_steps": 40, "delta": 1e-5}
    fixed = epsilon(sampler=CyclicPoisson(4_000, 40, 5), **run)
    drawn = RandomCyclicPoisson(4_000, 40, 5)
    assert epsilon(sampler=drawn, relation="add_or_remove_one", **run) == pytest.approx(fixed, 1e-6)
    assert epsilon(sampler=drawn.resized(45), **run) == epsilon(sampler=drawn, **run)
    _, no_place = drawn.event(1.1, 40).events
    assert isinstance(no_place, KnownBranchDpEvent)
    assert 0 < no_place.probability < 1e-14


def test_a_probability_of_failure_is_paid_from_delta():
    fails = KnownBranchDpEvent(dp_accounting.NoOpDpEvent(), dp_accounting.NonPrivateDpEvent(), 1e-3)
    gaussian = GaussianDpEvent(1.0)
    both = dp_accounting.ComposedDpEvent([gaussian, fails])
    assert event_epsilon(both, delta=5e-4) == math.inf
    for delta in (0.1, 2e-3):  # little of delta, and much of it
        expected = event_epsilon(gaussian, delta=delta - 1e-3)
        assert event_epsilon(both, delta=delta) == pytest.approx(expected, rel=2e-3)
        assert event_epsilon(both, delta=delta) > event_epsilon(gaussian, delta=delta)


def test_samplers_state_their_patterns():
    patterns = [
        sampler.participation(21)
        for sampler in (
            Shuffled(100, 10),
            BallsInBins(100, 10, 100),
            CyclicPoisson(100, 5, 7),
            RandomCyclicPoisson(100, 5, 7),
            MinSeparated(100, 10, 7, 100),
        )
    ]
    assert [pattern.max_count for pattern in patterns] == [3, 3, 3, 3, 3]
    assert [pattern.min_separation for pattern in patterns] == [1, 1, 7, 7, 7]
    assert [pattern.independent for pattern in patterns] == [False, False, True, True, False]
    assert max(pattern.crowded for pattern in patterns) < 1e-13
    assert BallsInBins(100, 10, 15).participation(21).crowded == pytest.approx(
        3 * scipy.stats.binom.sf(14, 99, 0.1)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSeparated(100, 10, 11), "min_separation cannot exceed steps_per_round"),
        (lambda: MinSeparated(5, 10, 2), "steps_per_round cannot exceed num_examples"),
        (lambda: RandomCyclicPoisson(10, 1, 11), "num_groups cannot exceed num_examples"),
        (lambda: RandomCyclicPoisson(100, 30, 4), "cannot exceed the mean size of a group"),
        (lambda: RandomCyclicPoisson(8, 4, 2, 3), "max_batch_size must be"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
