"""Poisson batches that are drawn again while they are too large: exact densities of small cases."""

import itertools
import math
from fractions import Fraction

import dp_accounting
import numpy as np
import pytest
import scipy.stats
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent

from dpoptax._dp_events import LimitedPoissonDpEvent
from dpoptax.accounting import RdpFilter, epsilon, event_epsilon
from dpoptax.accounting._compose import compositions
from dpoptax.accounting._epsilon import event_privacy_loss
from dpoptax.accounting._normalize_event import normalize_for_group
from dpoptax.accounting._renyi import renyi_steps
from dpoptax.accounting._step_pld import step_distribution
from dpoptax.relations import parse_relation
from dpoptax.samplers import CyclicPoisson, Poisson, UserPoisson

OUTPUTS = np.linspace(-22, 42, 30_001)
SPACING = OUTPUTS[1] - OUTPUTS[0]
CASES = [(5, 0.5, 2, 1.0), (7, 0.3, 3, 0.7), (3, 0.2, 1, 1.5), (6, 0.4, 4, 2.0)]


def density(moves, rate, largest, noise):
    """Of the noisy sum; `moves` says what each example adds. By the definition of the batch."""
    total, fits = np.zeros_like(OUTPUTS), 0.0
    for joins in itertools.product([False, True], repeat=len(moves)):
        size = sum(joins)
        if size <= largest:
            weight = rate**size * (1 - rate) ** (len(moves) - size)
            mean = float(np.dot(moves, joins))
            total += weight * scipy.stats.norm.pdf(OUTPUTS, mean, noise)
            fits += weight
    return total / fits


def exact_delta(first, second, at):
    return float(np.maximum(first - math.exp(at) * second, 0).sum() * SPACING)


def limited(size, rate, largest, noise):
    return LimitedPoissonDpEvent(
        PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), size, rate, largest
    )


def profiles(event, relation, at, grid_step=1e-3):
    """Removed and added; twice the same where the loss is symmetric."""
    loss = step_distribution(event, parse_relation(relation), grid_step)
    found = [one.deltas(np.array([at]))[0] for one in compositions([(loss, 1)], grid_step)]
    return found * 2 if len(found) == 1 else found


def neighbours(relation, others):
    """What the last example adds on both neighbours; None where there is no such example."""
    return {
        "add_or_remove_one": (1.0, None),
        "replace_special": (1.0, 0.0),
        "replace_one": (1, -1),
    }[relation]


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special", "replace_one"])
@pytest.mark.parametrize(("size", "rate", "largest", "noise"), CASES)
@pytest.mark.parametrize("other_adds", [-1.0, 0.0, 1.0])
def test_one_step_costs_at_least_what_its_density_reveals(
    relation, size, rate, largest, noise, other_adds
):
    old, new = neighbours(relation, other_adds)
    others = [other_adds] * (size - 1)
    first = density([*others, old], rate, largest, noise)
    second = density(others if new is None else [*others, new], rate, largest, noise)
    event = limited(size, rate, largest, noise)
    for at in (-1.0, -0.2, 0.05, 0.4, 1.5):
        removed, added = profiles(event, relation, at)
        assert exact_delta(first, second, at) <= removed + 1e-9
        assert exact_delta(second, first, at) <= added + 1e-9


def test_epsilon_is_that_of_the_worse_direction():
    """Here an example that is added costs more than one that is removed."""
    event = limited(*CASES[0])
    removed, added = profiles(event, "add_or_remove_one", 0.2)
    assert removed < 0.95 * added
    loss = event_privacy_loss(event, delta=0.1)
    assert loss.delta(0.2) == pytest.approx(added, rel=1e-2)
    assert loss.epsilon(added) == pytest.approx(0.2, abs=1e-2)


def test_a_bound_without_the_cost_of_the_limit_would_be_too_small():
    """The test above has power: it notices a step that is accounted as a plain Poisson batch."""
    # Others are far larger than the noise, and so reveal themselves. The example adds a quarter.
    others, rate, largest = [14.0] * 5, 0.4, 2
    first, second = (density(moves, rate, largest, 1.0) for moves in ([*others, 0.25], others))
    plain = PoissonSampledDpEvent(rate, GaussianDpEvent(4.0))
    event = limited(6, rate, largest, 4.0)
    for at, pair, direction in ((0.4, (first, second), 0), (0.2, (second, first), 1)):
        exact = exact_delta(*pair, at)
        assert exact > 1.1 * profiles(plain, "add_or_remove_one", at)[direction] + 1e-9
        assert exact <= profiles(event, "add_or_remove_one", at)[direction] + 1e-9


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special"])
@pytest.mark.parametrize("other_adds", [-1.0, 9.0])
def test_a_group_costs_at_least_what_its_density_reveals(group, relation, other_adds):
    others, rate, largest, noise = [other_adds] * 3, 0.4, 3, 1.2
    first = density([*others, *[1.0] * group], rate, largest, noise)
    absent = [] if relation == "add_or_remove_one" else [0.0] * group
    second = density([*others, *absent], rate, largest, noise)
    parsed = parse_relation(relation)
    steps = normalize_for_group(
        limited(3 + group, rate, largest, noise), delta=1e-9, relation=parsed, group_size=group
    )
    (event,) = steps.counts
    for at in (-0.5, 0.1, 0.8, 2.0):
        removed, added = profiles(event, relation, at, grid_step=2e-2)
        assert exact_delta(first, second, at) <= removed + 1e-9
        assert exact_delta(second, first, at) <= added + 1e-9


@pytest.mark.parametrize(("size", "rate", "largest", "noise"), CASES)
def test_the_renyi_divergence_is_bounded(size, rate, largest, noise):
    for other_adds in (0.0, 9.0):
        others = [other_adds] * (size - 1)
        first = density([*others, 1.0], rate, largest, noise)
        second = density(others, rate, largest, noise)
        for order in (1.5, 4.0, 20.0):
            steps, _ = renyi_steps(limited(size, rate, largest, noise), 1e-9, (order,))
            accountant = dp_accounting.rdp.RdpAccountant([order])
            for step in steps:
                accountant.compose(step)
            for p, q in ((first, second), (second, first)):
                inside = (p > 1e-200) & (q > 1e-200)
                logs = order * np.log(p[inside]) + (1 - order) * np.log(q[inside])
                exact = scipy.special.logsumexp(logs) + math.log(SPACING)
                assert exact / (order - 1) <= accountant._rdp[0] * (1 + 1e-6) + 1e-9


def test_the_cost_of_a_long_run_is_a_constant_per_step():
    """At 168 rows the cost shows: 9,380 steps of rate times the probability of a full batch."""
    run = {"noise_multiplier": 1.1, "num_steps": 9380, "delta": 1e-5}
    costs = [epsilon(sampler=Poisson(60_000, 128, size), **run) for size in (60_000, 176, 168)]
    rate = 128 / 60_000
    for cost, size in zip(costs[1:], (176, 168), strict=True):
        per_step = rate * scipy.stats.binom.pmf(size, 59_999, rate)
        assert cost - costs[0] == pytest.approx(9380 * per_step, rel=0.05)
    assert costs[1] < 1.0003 * costs[0]


@pytest.mark.parametrize("relation", ["replace_special", "replace_one"])
def test_a_limit_costs_nothing_where_no_example_is_added(relation):
    run = {"noise_multiplier": 1.0, "num_steps": 60, "delta": 1e-5, "relation": relation}
    assert epsilon(sampler=Poisson(500, 20, 25), **run) == epsilon(
        sampler=Poisson(500, 20, 500), **run
    )
    assert epsilon(sampler=CyclicPoisson(500, 20, 3, 22), **run) == epsilon(
        sampler=CyclicPoisson(500, 20, 3), **run
    )


def test_users_and_the_filter_pay_for_the_limit():
    run = {"noise_multiplier": 1.0, "num_steps": 60, "delta": 1e-5}
    users = [UserPoisson(range(500), 20, 1, size) for size in (25, 500)]
    assert epsilon(sampler=users[0], **run) > 1.04 * epsilon(sampler=users[1], **run)
    spent = []
    for sampler in users:
        budget = RdpFilter(epsilon=20.0, delta=1e-5)
        budget.charge(sampler.event(1.0, 60))
        spent.append(budget.spent())
    assert spent[0] > 1.01 * spent[1] > 0


def test_a_far_too_small_batch_has_an_epsilon_and_a_full_one_is_refused():
    def fits(size, rate, largest):
        terms = (
            math.comb(size, j) * rate**j * (1 - rate) ** (size - j) for j in range(largest + 1)
        )
        return sum(terms)

    for size, rate, largest in ((1000, Fraction(1, 2), 3), (20, Fraction(19, 20), 3)):
        event = limited(size, float(rate), largest, 1.0)
        exact = fits(size - 1, rate, largest) / fits(size, rate, largest)
        assert event.log_ratio() == pytest.approx(math.log(exact))
    # Where probabilities underflow, a bound takes their place.
    event = limited(100_000, 0.5, 2, 1.0)
    assert event.log_ratio() == pytest.approx(math.log(2), rel=1e-4)
    assert event.probability_of_crowding() == 1
    assert 0 < event_epsilon(event, delta=1e-5) < math.inf
    for make in (lambda: Poisson(9, 9, 8), lambda: CyclicPoisson(9, 3, 3, 2)):
        with pytest.raises(ValueError, match="max_batch_size must be"):
            make()


def test_a_group_may_be_larger_than_the_data_set():
    run = {"sampler": Poisson(5, 2, 3), "noise_multiplier": 1.0, "num_steps": 1, "delta": 1e-3}
    costs = [epsilon(**run, group_size=size) for size in (4, 5, 6)]
    assert costs == sorted(costs)
    assert math.isfinite(costs[-1])
