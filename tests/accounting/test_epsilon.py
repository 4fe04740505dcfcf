"""Epsilon: against published and independently computed values, and monotone."""

import csv
import itertools
import math
import pathlib

import dp_accounting
import numpy as np
import pytest
import scipy.stats
from dp_accounting import gaussian_mechanism

import dpoptax
from dpoptax._dp_events import RandomAllocationDpEvent, TruncatedRandomAllocationDpEvent
from dpoptax.accounting import epsilon, event_epsilon
from dpoptax.accounting._epsilon import event_privacy_loss
from dpoptax.accounting._normalize_event import OVERFLOW_FRACTION, normalize_for_group
from dpoptax.accounting._step_pld import step_distribution
from dpoptax.samplers import BallsInBins, CyclicPoisson, FixedSize, Poisson, Shuffled

TABLE = (pathlib.Path(__file__).parent / "reference.csv").read_text()
REFERENCE = list(csv.DictReader(TABLE.splitlines()))
RUN = {"noise_multiplier": 1.1, "num_steps": 1000, "delta": 1e-5}


def row_id(row):
    keys = ("relation", "sampling_rate", "noise_multiplier", "num_steps", "delta", "source")
    return ",".join(row[key] for key in keys)


@pytest.mark.parametrize(
    "row",
    [
        # Every fourth row while you work, all before a merge.
        pytest.param(row, id=row_id(row), marks=pytest.mark.slow if number % 4 else ())
        for number, row in enumerate(REFERENCE)
    ],
)
def test_the_reference_table(row):
    step = dp_accounting.PoissonSampledDpEvent(
        float(row["sampling_rate"]), dp_accounting.GaussianDpEvent(float(row["noise_multiplier"]))
    )
    value = event_epsilon(
        dp_accounting.SelfComposedDpEvent(step, int(row["num_steps"])),
        delta=float(row["delta"]),
        relation=row["relation"],
    )
    assert float(row["at_least"]) <= value <= float(row["at_most"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_examples", "size", "noise", "steps", "delta", "relation", "value"),
    [
        (60_000, 128, 1.1, 9380, 1e-5, "add_or_remove_one", 6.2845),
        (60_000, 256, 1.3, 3515, 1e-5, "add_or_remove_one", 4.356358606),
        (50_000, 4096, 3.0, 1000, 1e-5, "add_or_remove_one", 9.881213484),
        (60_000, 128, 2.2, 9380, 1e-5, "add_or_remove_one", 0.889913839),
        (60_000, 256, 1.3, 3515, 1e-5, "replace_one", 5.086535822),
        (60_000, 128, 1.5, 9360, 1 / 60_000, "replace_one", 2.501782044),
        (60_000, 128, 1.5, 9360, 1 / 60_000, "replace_special", 2.501782044),
    ],
)
def test_full_batches_are_accounted_by_their_own_distribution(
    num_examples, size, noise, steps, delta, relation, value
):
    """Against a privacy loss distribution of half the noise, and of the substitution profile."""
    sampler = FixedSize(num_examples, size)
    run = {"noise_multiplier": noise, "num_steps": steps, "delta": delta, "relation": relation}
    assert epsilon(sampler=sampler, **run) == pytest.approx(value, rel=5e-3)
    assert epsilon(sampler=Poisson(num_examples, size), **run) < value / 2


def test_a_full_batch_of_everyone_is_a_gaussian_of_twice_the_clip():
    run = {"noise_multiplier": 2.0, "num_steps": 1, "delta": 1e-5}
    exact = event_epsilon(dp_accounting.GaussianDpEvent(1.0), delta=1e-5)
    for relation in ("add_or_remove_one", "replace_one"):
        achieved = epsilon(sampler=FixedSize(100, 100), relation=relation, **run)
        assert achieved == pytest.approx(exact, rel=1e-3)


def test_an_order_without_amplification_costs_one_gaussian_per_pass():
    run = {"noise_multiplier": 1.1, "delta": 1e-5}
    gaussian = event_epsilon(dp_accounting.GaussianDpEvent(1.1 / math.sqrt(20)), delta=1e-5)
    assert gaussian == pytest.approx(24.92, rel=1e-3)
    for steps in (469 * 19 + 1, 469 * 20):  # a pass begun is a pass
        achieved = epsilon(
            sampler=Shuffled(60_000, 128), num_steps=steps, relation="replace_special", **run
        )
        assert achieved == pytest.approx(gaussian, rel=1e-4)


def test_the_event_of_bins_says_how_large_batches_may_get():
    event = BallsInBins(40, 3, max_batch_size=14).event(1.1, 4)
    assert event.count == 2
    assert event.event == TruncatedRandomAllocationDpEvent(40, 3, 14, 1.1)
    assert event.event.probability_of_full() == pytest.approx(scipy.stats.binom.sf(13, 39, 1 / 3))
    # Nobody sits out for one that is exchanged.
    replaced = BallsInBins(40, 3, max_batch_size=14).event(1.1, 4, "replace_one")
    gaussian = dp_accounting.GaussianDpEvent(1.1)
    assert replaced.event == RandomAllocationDpEvent(gaussian, 1, 3)
    # Nobody sits out if all fit.
    assert BallsInBins(40, 3, max_batch_size=40).event(1.1, 4) == replaced
    assert BallsInBins(40, 1).event(1.1, 4).event == gaussian


@pytest.mark.filterwarnings("ignore:delta should be well below")
@pytest.mark.slow
def test_an_attack_that_sees_which_bin_was_full_finds_no_more_than_epsilon():
    """Two bins, noise 1: others add 1 each, the target takes 1 away.

    Where one bin is full of others, the sum of the *other* bin, short of all who are left, says so;
    the target then lowers the sum of the full one by 2. The attack bets where a full bin is 4.5 too
    low.
    """
    size, capacity, delta = 10**6, 501_165, 1e-5
    others, normal = scipy.stats.binom(size - 1, 0.5), scipy.stats.norm()
    full = others.sf(capacity - 1)
    told = capacity + 16  # so many others in a bin are seen by the sum of the other bin
    mistaken = 2 * normal.sf(8)
    known = others.sf(told) * (1 - mistaken)
    found, false = known * normal.cdf(2 - 4.5), (full + mistaken) * normal.cdf(-4.5)
    # The target is in either bin with probability 1/2; the bet is on either.
    lower_bound = math.log((found - delta) / (2 * false + mistaken))
    mixture = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(1.0, (1.0, 2.0), (1 - full, full))
    run = {"sampler": BallsInBins(size, 2, max_batch_size=capacity), "noise_multiplier": 1.0}
    assert event_epsilon(mixture, delta=delta) < lower_bound
    assert lower_bound < epsilon(num_steps=2, delta=delta, **run)


def test_a_cyclic_run_is_the_poisson_run_of_one_group():
    run = {"noise_multiplier": 1.1, "delta": 1e-5, "relation": "replace_special"}
    cyclic = epsilon(sampler=CyclicPoisson(1000, 10, 4), num_steps=37, **run)
    assert cyclic == pytest.approx(epsilon(sampler=Poisson(250, 10), num_steps=10, **run))


def batches_that_are_cut(num_examples, expected, capacity, noise, steps):
    """Steps of dp-accounting's law, in which one example more may push another one out."""
    event = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
        num_examples, expected / num_examples, capacity, noise
    )
    return dp_accounting.SelfComposedDpEvent(event, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_examples", "expected", "capacity", "noise", "steps", "relation", "value"),
    [
        (60_000, 128, 150, 1.1, 9380, "add_or_remove_one", 2.777639868),
        (60_000, 128, 192, 1.1, 9380, "add_or_remove_one", 0.8899345002),
        (60_000, 128, 192, 1.1, 9380, "replace_one", 1.540833149),
        (50_000, 1024, 1152, 1.0, 2441, "add_or_remove_one", 6.468395484),
    ],
)
def test_truncation_is_accounted(num_examples, expected, capacity, noise, steps, relation, value):
    run = {"noise_multiplier": noise, "num_steps": steps, "delta": 1e-5, "relation": relation}
    cut = batches_that_are_cut(num_examples, expected, capacity, noise, steps)
    achieved = event_epsilon(cut, delta=1e-5, relation=relation)
    # The values are those of dp-accounting, which takes the worse pair of replace_one for batches
    # that overflow under every relation.
    assert 0.98 * value < achieved < 1.01 * value
    assert achieved > epsilon(sampler=Poisson(num_examples, expected), **run)


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
def test_the_shortcut_for_rare_overflow_bounds_the_exact_distribution(relation, monkeypatch):
    untruncated = epsilon(sampler=Poisson(1000, 20, 1000), relation=relation, **RUN)
    capacity = Poisson(1000, 20).max_batch_size
    cut = batches_that_are_cut(1000, 20, capacity, RUN["noise_multiplier"], RUN["num_steps"])
    shortcut = event_epsilon(cut, delta=RUN["delta"], relation=relation)
    monkeypatch.setattr(dpoptax.accounting._normalize_event, "OVERFLOW_FRACTION", 0.0)
    exact = event_epsilon(cut, delta=RUN["delta"], relation=relation)
    assert untruncated <= shortcut <= untruncated * (1 + 1e-4)
    assert exact == pytest.approx(shortcut, rel=1e-4)


@pytest.mark.parametrize("size", [2, 16])
def test_a_group_that_is_in_every_batch_costs_what_a_sum_moved_so_far_costs(size):
    always = dp_accounting.PoissonSampledDpEvent(1.0, dp_accounting.GaussianDpEvent(1.0))
    moved = dp_accounting.GaussianDpEvent(1.0 / size)
    assert event_epsilon(always, delta=1e-5, group_size=size) == event_epsilon(moved, delta=1e-5)


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.filterwarnings("ignore:delta should be well below")
def test_rare_overflow_is_paid_from_delta(group_size):
    """The probability that the other examples fill a batch at some step, from the binomial law."""
    size, expected, capacity, steps = 1000, 20, 40, 50
    others = scipy.stats.binom(size - group_size, expected / size)
    overflow = steps * others.sf(capacity - group_size)
    # As large a share of delta as is paid this way, so that it shows.
    delta = 1.01 * overflow / OVERFLOW_FRACTION
    run = {"noise_multiplier": 1.0, "num_steps": steps, "group_size": group_size}
    cut = batches_that_are_cut(size, expected, capacity, 1.0, steps)
    paid = event_epsilon(cut, delta=delta, group_size=group_size)
    never_full = Poisson(size, expected, size)
    assert paid == pytest.approx(epsilon(sampler=never_full, delta=delta - overflow, **run), 1e-9)
    assert paid > epsilon(sampler=never_full, delta=delta, **run) * (1 + 1e-3)


def test_every_reading_of_a_privacy_loss_pays_for_overflow():
    """Also the probabilities that a report derives from it."""
    size, expected, capacity, steps = 1000, 20, 40, 50
    overflow = steps * scipy.stats.binom(size - 1, expected / size).sf(capacity - 1)
    delta = 1.01 * overflow / OVERFLOW_FRACTION

    def loss(capacity):
        event = batches_that_are_cut(size, expected, capacity, 1.0, steps)
        return event_privacy_loss(event, delta=delta)

    paid, free = loss(capacity), loss(size)
    assert paid.overflow == pytest.approx(overflow)
    assert paid.epsilon(delta) == free.epsilon(delta - overflow)
    assert paid.epsilon(overflow / 2) == math.inf
    rates = [1e-3, 0.1]
    for few, more in zip(
        dpoptax.accounting.trade_off.true_positive_rates(free, rates),
        dpoptax.accounting.trade_off.true_positive_rates(paid, rates),
        strict=True,
    ):
        assert more > few


@pytest.mark.parametrize("noise_multiplier", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("num_steps", [1, 30])
def test_everyone_in_every_step_equals_the_analytic_gaussian(noise_multiplier, num_steps):
    analytic = gaussian_mechanism.get_epsilon_gaussian(
        noise_multiplier / math.sqrt(num_steps), 1e-5
    )
    run = {"noise_multiplier": noise_multiplier, "num_steps": num_steps, "delta": 1e-5}
    assert epsilon(sampler=Poisson(100, 100), **run) == pytest.approx(analytic, rel=1e-4)


def test_epsilon_falls_with_noise_and_delta_and_grows_with_rate_and_steps():
    def value(expected=20, **changes):
        return epsilon(sampler=Poisson(1000, expected), **(RUN | changes))

    base = value()
    assert value(noise_multiplier=1.2) < base < value(noise_multiplier=1.0)
    assert value(delta=1e-4) < base < value(delta=1e-6)
    assert value(num_steps=900) < base < value(num_steps=1100)
    assert value(expected=18) < base < value(expected=22)
    # Up to the cost of the limit on the size of batches.
    assert value(relation="replace_special") == pytest.approx(base, rel=1e-12)
    assert base < value(relation="replace_one")


def test_pld_is_never_looser_than_rdp():
    sampler = Poisson(1000, 20, 1000)
    rdp = dp_accounting.rdp.RdpAccountant()
    rdp.compose(sampler.event(1.1, 1000))
    assert epsilon(sampler=sampler, **RUN) < rdp.get_epsilon(1e-5)


@pytest.mark.parametrize("sampler", [Poisson(1000, 10), FixedSize(1000, 10)], ids=["coin", "size"])
def test_epsilon_grows_to_infinity_as_noise_falls_to_nothing(sampler):
    run = RUN | {"num_steps": 10}
    noises = [1.0, 0.3, 0.1, 0.05, 0.03, 0.01, 1e-3, 1e-5, 1e-200, 0.0]
    found = [epsilon(sampler=sampler, **(run | {"noise_multiplier": noise})) for noise in noises]
    assert all(less < more or less == more == math.inf for less, more in itertools.pairwise(found))
    assert found[5] < math.inf == found[-2] == found[-1]
    # More than three steps of the ten with a probability of 2e-6; each loses move^2 / (2 noise^2).
    move = 2 if isinstance(sampler, FixedSize) else 1
    assert found[4] == pytest.approx(3 * move**2 / (2 * 0.03**2), rel=0.1)


def test_a_group_never_costs_less_than_one_example():
    step = dp_accounting.PoissonSampledDpEvent(4.9e-9, dp_accounting.GaussianDpEvent(1.0))
    run = dp_accounting.SelfComposedDpEvent(step, 10**9)
    one, two = (event_epsilon(run, delta=1e-5, group_size=size) for size in (1, 2))
    assert 0 < one < two


def test_cyclic_groups_have_no_guarantee_under_add_or_remove_one():
    sampler = CyclicPoisson(1000, 10, 4)
    with pytest.raises(ValueError, match="no guarantee under add_or_remove_one"):
        epsilon(sampler=sampler, relation="add_or_remove_one", **RUN)
    absent, other = (
        epsilon(sampler=sampler, relation=relation, **RUN)
        for relation in ("replace_special", "replace_one")
    )
    assert absent < other


def test_the_ends():
    sampler = Poisson(1000, 20)
    assert epsilon(sampler=sampler, **(RUN | {"num_steps": 0})) == 0.0
    assert epsilon(sampler=sampler, **(RUN | {"noise_multiplier": 0.0})) == math.inf
    assert epsilon(sampler=sampler, **(RUN | {"noise_multiplier": 0.0, "num_steps": 0})) == 0.0


def truncated_density(outputs, noise, others, members, rate, capacity, *, adds, others_add):
    """The density of a noisy sum over a Poisson batch that is cut to a largest size.

    Each member of a group adds `adds`, and each of the others `others_add`.
    """
    total = np.zeros_like(outputs)
    for joined, present in itertools.product(range(others + 1), range(members + 1)):
        weight = scipy.stats.binom.pmf(joined, others, rate)
        weight *= scipy.stats.binom.pmf(present, members, rate)
        drawn = min(joined + present, capacity)
        # How many of the group are among those who are drawn.
        for inside in range(min(present, drawn) + 1):
            chance = 1.0  # in an empty batch, for which SciPy's distribution is not defined
            if drawn:
                chance = scipy.stats.hypergeom.pmf(inside, joined + present, present, drawn)
            mean = inside * adds + (drawn - inside) * others_add
            total += weight * chance * scipy.stats.norm.pdf(outputs, mean, noise)
    np.testing.assert_allclose(total.sum() * (outputs[1] - outputs[0]), 1, rtol=1e-6)
    return total


@pytest.mark.parametrize(
    ("size", "rate", "capacity", "noise"), [(5, 0.5, 2, 1.0), (7, 0.3, 3, 0.7)]
)
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_one_truncated_step_costs_at_least_what_the_worst_data_reveal(
    size, rate, capacity, noise, relation
):
    """All others add -1 and the example adds 1, or -1 and 1 are exchanged: by exact densities."""
    outputs = np.linspace(-capacity - 12, capacity + 12, 40_001)
    spacing = outputs[1] - outputs[0]

    def density(moves):
        """Of the output; `moves` says what the last example adds, or that there is none."""
        members = 0 if moves is None else 1
        sizes = (size - 1, members, rate, capacity)
        return truncated_density(outputs, noise, *sizes, adds=moves or 0, others_add=-1)

    old, new = (density(1.0), density(None if relation == "add_or_remove_one" else -1.0))
    event = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(size, rate, capacity, noise)
    loss = event_privacy_loss(event, delta=1e-12, relation=relation)
    for at in (0.1, 0.8, 2.0):
        for first, second in ((old, new), (new, old)):
            exact = np.maximum(first - math.exp(at) * second, 0).sum() * spacing
            assert exact <= loss.delta(at) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("group", [2, 4])
def test_a_truncated_step_costs_a_group_at_least_what_the_worst_data_reveal(group):
    """All others add -1 and each member of the group adds 1: by exact densities."""
    others, rate, capacity, noise = 5, 0.4, 3, 1.5
    outputs = np.linspace(-14, 14, 20_001)

    def density(members):
        sizes = (others, members, rate, capacity)
        return truncated_density(outputs, noise, *sizes, adds=1, others_add=-1)

    event = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
        others + group, rate, capacity, noise
    )
    with_group, without = density(group), density(0)
    for first, second in ((with_group, without), (without, with_group)):
        for at in (0.3, 1.0):
            exact = np.maximum(first - math.exp(at) * second, 0).sum() * (outputs[1] - outputs[0])
            if exact > 1e-9:
                assert event_epsilon(event, delta=exact, group_size=group) >= at - 1e-6


@pytest.mark.parametrize("other_adds", [-1, 1])
def test_members_of_a_group_that_are_not_there_displace_others_too(other_adds):
    """Under replace_special the batch is the same on both neighbours: by exact densities."""
    others, group, rate, capacity, noise = 4, 2, 0.5, 2, 1.0
    outputs = np.linspace(-14, 14, 20_001)

    def density(adds):
        sizes = (others, group, rate, capacity)
        return truncated_density(outputs, noise, *sizes, adds=adds, others_add=other_adds)

    event = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
        others + group, rate, capacity, noise
    )
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    steps = normalize_for_group(event, delta=1e-12, relation=relation, group_size=group)
    (step,) = steps.counts
    loss = step_distribution(step, relation, 1e-3)
    # In compositions, the profile counts in both directions and below zero as well.
    with_group, without = density(1), density(0)
    for first, second, bound in (
        (with_group, without, loss._pmf_remove),
        (without, with_group, loss._pmf_add),
    ):
        for at in (-2.0, -0.5, 0.5, 2.0):
            exact = np.maximum(first - math.exp(at) * second, 0).sum() * (outputs[1] - outputs[0])
            assert exact <= bound.get_delta_for_epsilon(at) + 1e-9
