"""The tests behind the bounds, against exact probabilities."""

import numpy as np
import pytest
from audit.exact_mechanisms import Lines, largest_probability

from dpoptax._attacks import _independent, _one_run
from dpoptax._attacks._curves import EpsilonDeltaCurve, GaussianCurve

ROUNDING = 1e-6
SHAPES = [(1, 1, 0), (2, 1, 1), (3, 1, 1), (3, 2, 0), (4, 2, 0), (4, 2, 2)]
CLAIMS = [(1.0, 0.0), (1.0, 0.05), (0.3, 0.02)]
GAUSSIAN = [(epsilon, GaussianCurve(1.0).delta(epsilon)) for epsilon in (0.0, 0.5, 1.5)]


def smallest_level(is_refuted):
    """The smallest probability of a wrong bound at which a claim is refuted."""
    low, high = 0.0, 1.0
    if not is_refuted(high):
        return 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if is_refuted(middle) else (middle, high)
    return high


def level_of_curve(shape, num_correct, pairs, one_sided):
    outcome = _one_run.Outcome(shape[0], shape[1] + shape[2], num_correct, one_sided, 1.0)
    return smallest_level(lambda level: _one_run.curve_is_refuted(outcome, Lines(pairs), level))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_private_mechanism_is_right_more_often_than_the_bounds_say(shape):
    num_guesses = shape[1] + shape[2]
    for claim in CLAIMS:
        for num_correct in {num_guesses, max(num_guesses - 1, 1)}:
            exact = largest_probability(*shape, num_correct, [claim])
            outcome = _one_run.Outcome(shape[0], num_guesses, num_correct, shape[2] == 0, 1.0)
            of_pair = smallest_level(
                lambda level, outcome=outcome, claim=claim: _one_run.epsilon_delta_is_refuted(
                    outcome, *claim, level
                )
            )
            of_curve = level_of_curve(shape, num_correct, [claim], shape[2] == 0)
            assert exact <= of_pair + ROUNDING
            assert exact <= of_curve + ROUNDING
            # Not far above either, where all guesses are right.
            if num_correct == num_guesses:
                assert of_curve < 1.4 * exact + 0.02


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 2, 0), (4, 2, 0)], ids=str)
def test_the_bound_of_a_curve_holds_for_mechanisms_with_this_curve(shape):
    num_guesses = shape[1] + shape[2]
    exact = largest_probability(*shape, num_guesses, GAUSSIAN)
    level = level_of_curve(shape, num_guesses, GAUSSIAN, shape[2] == 0)
    assert exact - ROUNDING <= level < 1.3 * exact


def test_guesses_of_both_kinds_do_not_get_the_bound_of_one_kind():
    exact = largest_probability(4, 2, 2, 4, [CLAIMS[1]])
    assert level_of_curve((4, 2, 2), 4, [CLAIMS[1]], one_sided=True) < exact - 0.03


def test_the_delta_term_is_needed():
    # One canary of two is revealed with probability delta, in either of two ways.
    exact = largest_probability(2, 1, 1, 2, [(0.0, 0.2)])
    outcome = _one_run.Outcome(2, 2, 2, False, 1.0)
    without = smallest_level(
        lambda level: _one_run.epsilon_delta_is_refuted(outcome, 0.0, 0.0, level)
    )
    assert exact > without + 0.05


def test_unequal_trials_are_right_no_more_often_than_equal_ones():
    # The accuracy of canaries of different kinds: a sum of trials with other probabilities.
    rng = np.random.default_rng(0)
    curve = GaussianCurve(1.0)
    best = 0.5 + 0.5 * curve.delta(0.0)
    for spread in (0.0, 0.1, 0.3):
        chances = np.clip(best + spread * rng.choice([-1, 1], 60), 0, 1)
        chances -= max(chances.mean() - best, 0.0)
        exact = np.ones(1)
        for chance in chances:
            exact = np.convolve(exact, [1 - chance, chance])
        for level in (0.05, 0.01):
            refuting = [
                correct
                for correct in range(61)
                if _independent.accuracy_is_refuted(
                    _independent.Trials(30, 30, correct, 0, 30, 0, 30), curve, level
                )
            ]
            assert exact[min(refuting) :].sum() <= level + 1e-9
            # Not wasteful for equal trials.
            assert spread > 0 or exact[min(refuting) - 1 :].sum() > level


def test_rates_are_refuted_by_exact_intervals():
    # 0 of 20 wrong: the rate is at most 1 - 0.025^(1/20). 20 of 20 found: at least 0.025^(1/20).
    end = 0.025 ** (1 / 20)
    assert _independent.least_rate(20, 20, 0.025) == pytest.approx(end)
    assert _independent.largest_rate(0, 20, 0.025) == pytest.approx(1 - end)
    outcome = _independent.Trials(20, 20, 40, 20, 20, 0, 20)
    refuted = np.log(end / (1 - end))
    for epsilon, expected in ((refuted - 1e-6, True), (refuted + 1e-6, False)):
        curve = EpsilonDeltaCurve(epsilon, 0.0)
        assert _independent.rates_are_refuted(outcome, curve, 0.05) == expected


@pytest.mark.parametrize("curve", [GaussianCurve(1.2), EpsilonDeltaCurve(0.7, 0.03)], ids=str)
def test_curves_are_the_hull_of_their_epsilons_and_deltas(curve):
    epsilons = np.linspace(0.0, 5.0, 4001)
    lines = Lines([(epsilon, curve.delta(epsilon)) for epsilon in epsilons])
    for rate in (0.02, 0.1, 0.5, 0.9, 0.999):
        found = curve.least_false_positive_rate(rate)
        assert found == pytest.approx(lines.least_false_positive_rate(rate), abs=1e-6)
