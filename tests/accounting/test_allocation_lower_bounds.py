"""Certified intervals of random allocation: lower bounds rounded down, upper bounds rounded up."""

import math

import dp_accounting
import lower_bounds
import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent

from dpoptax._dp_events import RandomAllocationDpEvent
from dpoptax.accounting import _random_allocation
from dpoptax.accounting._compose import compositions
from dpoptax.accounting._epsilon import event_privacy_loss

# The values that an accountant of another method finds, to four digits; removed and added. The
# first row is by quadrature.
ROWS = [
    (1.0, 2, 1, 1e-5, 3.69739, 3.07973),
    pytest.param(1.1, 3, 1, 1e-5, 2.8651, 2.2360, marks=pytest.mark.slow),
    pytest.param(1.0, 10, 1, 1e-5, 2.1888, 1.3649, marks=pytest.mark.slow),
    pytest.param(0.8, 100, 10, 1e-6, 3.4349, 2.5302, marks=pytest.mark.slow),
    (1.1, 469, 20, 1e-5, 0.8699, 0.8528),
    pytest.param(2.0, 1000, 50, 1e-6, 0.4789, 0.4785, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("noise", "steps", "rounds", "delta", "removed", "added"), ROWS)
def test_a_certified_interval_contains_the_reference(noise, steps, rounds, delta, removed, added):
    gaussian = GaussianDpEvent(noise)
    event = dp_accounting.SelfComposedDpEvent(RandomAllocationDpEvent(gaussian, 1, steps), rounds)
    loss = event_privacy_loss(event, delta=delta)
    upper = [direction.epsilon(delta) for direction in loss.directions]
    lower = lower_bounds.epsilon(steps, noise, rounds, delta)
    for low, reference, high in zip(lower, (removed, added), upper, strict=True):
        assert low <= reference + 5e-5
        assert reference <= high + 5e-5
        assert 0 < high - low < 0.01 * reference


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("steps", "noise"), [(3, 1.1), (50, 0.7), pytest.param(469, 0.6, marks=pytest.mark.slow)]
)
def test_the_interval_of_one_round_is_narrow_and_contains_the_simulation(steps, noise):
    rng, at, draws = np.random.default_rng(3), np.array([0.02, 0.3, 1.0]), 40_000
    z = rng.standard_normal((draws, steps)) / noise
    without = np.exp(z - 0.5 / noise**2).mean(axis=1)
    z[:, 0] += 1 / noise**2
    joined = np.exp(z - 0.5 / noise**2).mean(axis=1)
    lower = lower_bounds.deltas(steps, noise, at)
    distribution = _random_allocation.random_allocation(steps, noise, 1e-3)
    upper = [one.deltas(at) for one in compositions([(distribution, 1)], 1e-3)]
    for row, level in enumerate(at):
        for low, high, terms in (
            (lower[0][row], upper[0][row], np.maximum(1 - math.exp(level) / joined, 0)),
            (lower[1][row], upper[1][row], np.maximum(1 - math.exp(level) * without, 0)),
        ):
            error = 5 * terms.std() / math.sqrt(draws) + 1e-9
            assert low - error <= terms.mean() <= high + error
            assert low <= high * (1 + 1e-9) + 1e-12
            assert high - low <= 0.06 * high + 1e-9


def test_a_coarser_grid_only_lowers_the_lower_bound():
    """So does the interval notice a bound that is rounded to the wrong side."""
    at = np.array([0.1, 0.5])
    fine = np.array(lower_bounds.deltas(37, 1.0, at))
    values, probs = lower_bounds.sum_of(37, 1.0, 1 / 8)
    coarse = np.maximum(values / 37 - np.exp(at)[:, None], 0) @ probs
    assert np.all(coarse < fine[0])
    assert probs.sum() == pytest.approx(1)
    assert probs @ values == pytest.approx(37)
