"""Sensitivity: never below what brute force over all patterns of steps finds."""

import itertools
import math

import numpy as np
import pytest

from dpoptax.mechanisms.strategies import (
    BandedInverse,
    BandedToeplitz,
    BufferedToeplitz,
    Cyclic,
    DenseStrategy,
    OncePerRound,
    Separated,
    sensitivity,
)

STEPS = 9


def patterns(participation):
    """All largest patterns of a run, from the definition in words."""
    for size in range(1, STEPS + 1):
        for steps in itertools.combinations(range(STEPS), size):
            gaps = np.diff(steps)
            match participation:
                case Separated(separation=separation, count=count):
                    allowed = (gaps >= separation).all() and size <= (count or STEPS)
                case Cyclic(period=period):
                    allowed = (gaps % period == 0).all()
                case OncePerRound(period=period):
                    rounds = [step // period for step in steps]
                    allowed = len(set(rounds)) == size
            if allowed:
                yield list(steps)


def brute_force(matrix, participation):
    """The largest norm over all patterns and all contributions of -1 and 1, which are extreme."""
    largest = 0.0
    for steps in patterns(participation):
        signs = np.array(list(itertools.product([-1.0, 1.0], repeat=len(steps) - 1)))
        contributions = np.concatenate([np.ones((len(signs), 1)), signs], axis=1)
        moved = contributions @ matrix[:, steps].T
        largest = max(largest, np.linalg.norm(moved, axis=1).max())
    return largest


def decreasing():
    return tuple(np.sort(np.random.default_rng(3).uniform(size=STEPS))[::-1].tolist())


def random_matrix(lowest):
    numbers = np.random.default_rng(4).uniform(lowest, 1.0, size=(STEPS, STEPS))
    return np.tril(numbers) + np.eye(STEPS)


STRATEGIES = {
    "square root": BandedToeplitz.square_root(4, STEPS),
    "two equal bands": BandedToeplitz((1.0, 1.0), STEPS),
    "decreasing": BandedToeplitz(decreasing(), STEPS),
    "increasing": BandedToeplitz((1.0, 1.5, 2.0), STEPS),
    "negative": BandedToeplitz((1.0, -0.7, 0.4), STEPS),
    "inverse": BandedInverse.square_root(3, STEPS),
    "oscillating inverse": BandedInverse((1.0, 0.8, -0.3), STEPS),
    "buffers": BufferedToeplitz((0.4, 0.1), (0.3, 0.9), STEPS),
    "dense": DenseStrategy(random_matrix(0.0)),
    "dense, negative": DenseStrategy(random_matrix(-1.0)),
}
PARTICIPATIONS = [
    Separated(1),
    Separated(1, 2),
    Separated(2),
    Separated(3, 2),
    Separated(4, 9),
    Separated(1, 1),
    Cyclic(1),
    Cyclic(2),
    Cyclic(4),
    OncePerRound(3),
    OncePerRound(4),
    OncePerRound(9),
]
EXACT = {"square root", "two equal bands", "decreasing", "inverse", "buffers"}


@pytest.mark.parametrize("participation", PARTICIPATIONS, ids=repr)
@pytest.mark.parametrize("name", STRATEGIES)
def test_sensitivity_bounds_brute_force(name, participation):
    strategy = STRATEGIES[name]
    exact = brute_force(strategy.matrix(), participation)
    found = sensitivity(strategy, participation)
    assert exact <= found
    # A bound that is too large by much would pass every test but this one.
    assert found <= 2 * exact
    nonnegative = (strategy.matrix() >= 0).all()
    if isinstance(participation, Cyclic) and nonnegative:
        assert found == pytest.approx(exact, rel=1e-5)
    if isinstance(participation, Separated) and name in EXACT:
        assert found == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["square root", "increasing", "negative"])
def test_columns_that_do_not_overlap_are_exact(name):
    strategy = STRATEGIES[name]
    for count in (1, 2, None):
        participation = Separated(strategy.num_bands, count)
        exact = brute_force(strategy.matrix(), participation)
        assert sensitivity(strategy, participation) == pytest.approx(exact, rel=1e-5)
        dense = DenseStrategy(strategy.matrix())
        assert sensitivity(dense, participation) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_participation_has_sensitivity_one(name):
    assert sensitivity(STRATEGIES[name], Separated(STEPS)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_sensitivity_grows_with_the_steps_and_is_rounded_up(name):
    strategy = STRATEGIES[name]
    by_steps = [sensitivity(strategy, Separated(2), steps) for steps in range(1, STEPS + 1)]
    assert by_steps == sorted(by_steps)
    corner = DenseStrategy(strategy.matrix(4))
    scale = np.linalg.norm(strategy.matrix(4), axis=0).max()
    assert by_steps[3] >= brute_force_corner(corner.matrix() * scale)


def brute_force_corner(matrix):
    """The same for four steps, two apart."""
    pairs = [(0, 2), (0, 3), (1, 3)]
    sums = [matrix[:, a] + sign * matrix[:, b] for a, b in pairs for sign in (1, -1)]
    return max(np.linalg.norm(total) for total in sums)


def test_more_participations_and_less_separation_cost_more():
    strategy = BandedToeplitz.square_root(8, 40)
    by_count = [sensitivity(strategy, Separated(4, count)) for count in range(1, 11)]
    assert by_count == sorted(set(by_count))
    by_separation = [sensitivity(strategy, Separated(separation, 4)) for separation in (9, 5, 1)]
    assert by_separation == sorted(set(by_separation))
    # Independent noise: the root of the number of participations.
    independent = BandedToeplitz((1.0,), 40)
    assert sensitivity(independent, Separated(4)) == pytest.approx(math.sqrt(10), rel=1e-5)


def test_a_long_run_is_fast_enough_to_test():
    strategy = BandedToeplitz.square_root(30_000, 30_000)
    assert sensitivity(strategy, OncePerRound(469)) > sensitivity(strategy, Separated(469)) > 1


def test_more_steps_than_the_strategy_has_are_refused():
    with pytest.raises(ValueError, match="covers 9 steps"):
        sensitivity(STRATEGIES["square root"], Cyclic(2), num_steps=10)
