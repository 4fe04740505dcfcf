"""Composition: exact far in the tail, where the rounding of a plain convolution dominates."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import NeighboringRelation, gaussian_mechanism
from dp_accounting.pld import privacy_loss_distribution

from dpoptax._dp_events import KnownBranchDpEvent
from dpoptax.accounting import epsilon, event_epsilon
from dpoptax.accounting._compose import compositions
from dpoptax.accounting._epsilon import coarse_epsilon, event_privacy_loss
from dpoptax.accounting._step_pld import grid_step, step_distribution
from dpoptax.accounting._subsampled_gaussian import poisson
from dpoptax.samplers import Poisson

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8, 1e-10, 1e-12, 1e-14])
@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (30.0, 1000), (400.0, 10**6)])
def test_gaussians_one_by_one_are_the_analytic_gaussian_far_into_the_tail(delta, noise, steps):
    step = dp_accounting.GaussianDpEvent(noise)
    grid = grid_step({step: steps})
    (loss,) = compositions([(step_distribution(step, ADD_OR_REMOVE, grid), steps)], grid)
    exact = gaussian_mechanism.get_epsilon_gaussian(noise / math.sqrt(steps), delta)
    assert exact * (1 - 1e-9) <= loss.epsilon(delta) <= exact * (1 + 2e-3)


def test_a_plain_convolution_would_understate_epsilon():
    """Why this library has its own composition: at delta = 1e-12 rounding takes 1 % away."""
    step = dp_accounting.PoissonSampledDpEvent(128 / 60_000, dp_accounting.GaussianDpEvent(1.1))
    grid = grid_step({step: 9380})
    one = step_distribution(step, ADD_OR_REMOVE, grid)
    plain = one.self_compose(9380)
    ours = compositions([(one, 9380)], grid)
    for delta, agrees in ((1e-6, True), (1e-12, False)):
        value = max(direction.epsilon(delta) for direction in ours)
        assert (plain.get_epsilon_for_delta(delta) == pytest.approx(value, rel=1e-5)) is agrees
    # Published bounds of the same run at 1e-12, on another grid: [1.6623, 1.6792].
    assert 1.6623 < value < 1.6792


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "noise", "steps"),
    [(0.002, 1.1, 1000), (0.1, 0.7, 30), (0.4, 8.0, 400), (1e-4, 0.4, 99)],
)
@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_deltas_agree_with_dp_accounting(rate, noise, steps, relation):
    grid = 1e-3
    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        value_discretization_interval=grid,
        neighboring_relation=relation,
    )
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    ours = compositions([(step_distribution(step, relation, grid), steps)], grid)
    epsilons = np.linspace(0.0, 6.0, 50)
    expected = theirs.self_compose(steps).get_delta_for_epsilon(epsilons)
    actual = np.max([direction.deltas(epsilons) for direction in ours], axis=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=3e-12)
    for delta in (1e-2, 1e-5):
        value = max(direction.epsilon(delta) for direction in ours)
        other = theirs.self_compose(steps).get_epsilon_for_delta(delta)
        assert value == pytest.approx(other, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("rate", "noise"), [(0.002, 1.1), (0.5, 0.5), (0.1, 0.2), (1e-6, 1.0)])
def test_the_closed_form_of_one_poisson_batch_is_dp_accountings(rate, noise):
    grid = 1e-3 if rate > 1e-3 else 1e-6
    ours = poisson(rate, noise, grid)
    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=grid
    )
    epsilons = np.linspace(0.0, 5.0, 100)
    np.testing.assert_allclose(
        ours.get_delta_for_epsilon(epsilons),
        theirs.get_delta_for_epsilon(epsilons),
        rtol=1e-6,
        atol=1e-13,
    )


def test_composition_is_associative_and_does_not_depend_on_the_order():
    def poisson_event(noise, count):
        gaussian = dp_accounting.GaussianDpEvent(noise)
        return dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(0.01, gaussian), count
        )

    a, b, c = poisson_event(1.0, 100), poisson_event(2.0, 300), dp_accounting.GaussianDpEvent(9.0)
    compose = dp_accounting.ComposedDpEvent
    values = [
        event_epsilon(event, delta=1e-6)
        for event in (
            compose([compose([a, b]), c]),
            compose([a, compose([b, c])]),
            compose([c, b, a]),
            compose([poisson_event(1.0, 60), c, b, poisson_event(1.0, 40)]),
        )
    ]
    assert max(values) - min(values) < 1e-9
    twice = event_epsilon(dp_accounting.SelfComposedDpEvent(compose([a, b]), 2), delta=1e-6)
    again = event_epsilon(compose([a, b, b, a]), delta=1e-6)
    assert twice == pytest.approx(again, rel=1e-9)
    assert twice > max(values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "noise", "delta"),
    [
        pytest.param(1.3e-4, 0.53, 1e-12, marks=pytest.mark.nightly),
        (0.002, 1.1, 1e-8),
        (1e-6, 0.3, 1e-5),
        (0.1, 5.0, 1e-3),
    ],
)
def test_epsilon_grows_with_every_step_however_rare_and_large_the_losses(rate, noise, delta):
    gaussian = dp_accounting.GaussianDpEvent(noise)
    step = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    grid = 8 * grid_step({step: 10**6})
    one = step_distribution(step, ADD_OR_REMOVE, grid)
    values = []
    for steps in np.unique(np.geomspace(1, 2e6, 100).astype(int)):
        ours = compositions([(one, int(steps))], grid)
        values.append(max(direction.epsilon(delta) for direction in ours))
    assert np.all(np.diff(values) >= -1e-9 * np.array(values[1:]))
    assert values[-1] > 0.5


@pytest.mark.parametrize("steps", [772_218, 779_354, 781_647, 782_801])
def test_amplified_rounding_far_below_epsilon_does_not_count_as_delta(steps):
    """A search from the smallest loss up once stopped at rounding errors, and found epsilon 0."""
    gaussian = dp_accounting.GaussianDpEvent(0.5302017753393868)
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(1.31e-4, gaussian), steps
    )
    assert 8.40 < coarse_epsilon(event, delta=1.04e-12, coarsening=8.0) < 8.47


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta"),
    [
        (1.1683e-5, 19.148, 3, 4.537e-8),  # epsilon is a single step of the grid
        (8.3133e-5, 0.64969, 5, 9.1823e-5),
        (1.27e-4, 1.76846, 1, 2.0695e-4),  # delta suffices at epsilon 0
        (1.0153e-5, 19.8297, 2, 7.5e-4),
    ],
)
def test_epsilons_near_zero_are_those_of_dp_accounting(rate, noise, steps, delta):
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    grid = 2 * max(grid_step({step: steps}), 1e-5)
    one = step_distribution(step, ADD_OR_REMOVE, grid)
    theirs = (one.self_compose(steps) if steps > 1 else one).get_epsilon_for_delta(delta)
    ours = max(direction.epsilon(delta) for direction in compositions([(one, steps)], grid))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-12)


def test_a_run_too_long_for_a_window_is_bounded_all_the_same(monkeypatch):
    loss = event_privacy_loss(Poisson(1000, 20).event(1.1, 1000), delta=1e-6)
    exact, delta = loss.epsilon(1e-6), loss.delta(5.0)
    monkeypatch.setattr("dpoptax.accounting._compose.MAX_POINTS", 10)
    assert exact < loss.epsilon(1e-6) < 1.3 * exact
    assert delta < loss.delta(5.0) < 1e-6  # Chernoff lacks the factor of about 1 / (tilt^2 spread)


def test_epsilon_and_delta_invert_each_other():
    event = Poisson(1000, 20).event(1.1, 1000)
    loss = event_privacy_loss(event, delta=1e-8)
    for delta in (1e-3, 1e-5, 1e-8):
        assert loss.delta(loss.epsilon(delta)) == pytest.approx(delta, rel=1e-4, abs=3e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:delta should be well below")
def test_steps_that_practically_cost_nothing_cost_nothing():
    run = {"sampler": Poisson(10**7, 1), "noise_multiplier": 1.0}
    assert epsilon(num_steps=1, delta=1e-3, **run) == 0.0
    assert epsilon(num_steps=10**7, delta=1e-3, **run) < 0.01


@pytest.mark.parametrize(
    ("event", "relation", "exact"),
    [
        (dp_accounting.LaplaceDpEvent(2.0), "add_or_remove_one", 0.5),
        (dp_accounting.dp_event.DiscreteLaplaceDpEvent(0.5, 1), "add_or_remove_one", 0.5),
        # Two buckets, honest with probability 3/4: epsilon = log 3, for every count.
        (dp_accounting.dp_event.RandomizedResponseDpEvent(0.5, 2), "replace_one", math.log(3)),
    ],
)
def test_other_mechanisms_cost_their_pure_epsilon_and_counts_count(event, relation, exact):
    pure = event_epsilon(event, delta=1e-9, relation=relation)
    assert pure == pytest.approx(exact, rel=1e-3)
    three = dp_accounting.SelfComposedDpEvent(event, 3)
    assert event_epsilon(three, delta=1e-9, relation=relation) == pytest.approx(3 * exact, rel=1e-3)


def test_unknown_events_are_refused_under_the_relation_in_question():
    laplace = dp_accounting.LaplaceDpEvent(2.0)
    with pytest.raises(dp_accounting.UnsupportedEventError, match=r"Laplace.*under replace_one"):
        event_epsilon(laplace, delta=1e-5, relation="replace_one")
    sampled = dp_accounting.SampledWithReplacementDpEvent(100, 10, dp_accounting.GaussianDpEvent(1))
    with pytest.raises(dp_accounting.UnsupportedEventError, match="SampledWithReplacement"):
        event_epsilon(sampled, delta=1e-5)


@pytest.mark.parametrize(
    ("event", "value"),
    [
        (dp_accounting.NoOpDpEvent(), 0.0),
        (dp_accounting.NonPrivateDpEvent(), math.inf),
        (dp_accounting.GaussianDpEvent(0.0), math.inf),
        (dp_accounting.PoissonSampledDpEvent(0.0, dp_accounting.GaussianDpEvent(1.0)), 0.0),
        (dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(0.0)), math.inf),
        (dp_accounting.ComposedDpEvent([]), 0.0),
    ],
)
def test_the_ends_of_events(event, value):
    assert event_epsilon(event, delta=1e-5) == value


def test_an_infinite_loss_is_paid_from_delta():
    """A step without any noise, with a tenth of delta as its probability."""
    delta, gaussian = 1e-5, dp_accounting.GaussianDpEvent(4.0)
    step = KnownBranchDpEvent(gaussian, dp_accounting.NonPrivateDpEvent(), delta / 10)
    for steps in (1, 5, 9):
        fails = 1 - (1 - delta / 10) ** steps
        left = (delta - fails) / (1 - fails)
        exact = gaussian_mechanism.get_epsilon_gaussian(4.0 / math.sqrt(steps), left)
        found = event_epsilon(dp_accounting.SelfComposedDpEvent(step, steps), delta=delta)
        assert exact <= found <= exact * 1.003
    assert event_epsilon(dp_accounting.SelfComposedDpEvent(step, 11), delta=delta) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize(("size", "value"), [(1, 0.8899138), (3, 3.0202652), (10, 12.5677761)])
def test_groups_against_reference_values(size, value):
    run = {"noise_multiplier": 1.1, "num_steps": 9380, "delta": 1e-5, "group_size": size}
    assert epsilon(sampler=Poisson(60_000, 128), **run) == pytest.approx(value, rel=5e-3)


def test_a_group_moves_a_gaussian_group_size_times_as_far():
    exact = gaussian_mechanism.get_epsilon_gaussian(5.0 / 3, 1e-5)
    event = dp_accounting.GaussianDpEvent(5.0)
    assert event_epsilon(event, delta=1e-5, group_size=3) == pytest.approx(exact, rel=1e-4)


def test_a_group_without_a_known_distribution_pays_the_general_bound():
    """Lemma 2.2 of Vadhan 2017, at one point."""
    event = Poisson(60_000, 128).event(1.1, 9380)
    single = event_privacy_loss(event, delta=1e-5, relation="replace_one")
    bound = event_epsilon(event, delta=1e-5, relation="replace_one", group_size=2)
    one = bound / 2
    factor = math.expm1(2 * one) / math.expm1(one)
    assert single.delta(one) * factor == pytest.approx(1e-5, rel=0.05)
    assert bound > 2 * single.epsilon(1e-5)
