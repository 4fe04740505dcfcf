"""Lower bounds hold at their confidence for correct runs, also for hostile ones, and are useful."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from audit.exact_mechanisms import Lines

import dpoptax
from dpoptax._attacks import _bounds, _independent, _one_run
from dpoptax._attacks._curves import (
    EpsilonDeltaCurve,
    GaussianCurve,
    epsilon_delta_family,
    gaussian_family,
    plan_family,
)

LEVEL = 0.05
NUM_RUNS = 400
# A correct method exceeds this in one of 10,000 tests.
TOLERANCE = scipy.stats.binom.ppf(1 - 1e-4, NUM_RUNS, LEVEL)


def split(scores, is_in):
    return scores[is_in], scores[~is_in]


def gaussian(rng, num_canaries, mu=1.0):
    """Normal scores."""
    is_in = rng.random(num_canaries) < 0.5
    return split(rng.normal(size=num_canaries) + mu * is_in, is_in)


def randomized_response(rng, num_canaries, epsilon=1.0, delta=0.05):
    """Each canary's coin is told rightly by an epsilon-private answer, or else revealed."""
    is_in = rng.random(num_canaries) < 0.5
    right = rng.random(num_canaries) < scipy.special.expit(epsilon)
    revealed = rng.random(num_canaries) < delta
    told = np.where(is_in == right, 1.0, -1.0)
    return split(np.where(revealed, np.where(is_in, 3.0, -3.0), told), is_in)


def all_or_none(rng, num_canaries, chance=0.2, mu=5.0):
    """With a small probability nearly all coins are revealed together, and else none."""
    return gaussian(rng, num_canaries, mu if rng.random() < chance else 0.0)


# Of `all_or_none`: which of the two happened is visible, and does not depend on the coins.
ALL_OR_NONE = Lines(
    [(epsilon, 0.2 * GaussianCurve(5.0).delta(epsilon)) for epsilon in np.linspace(0, 25, 100)]
)


def one_run(in_scores, out_scores, curve, delta=0.05):
    test = _bounds._one_run_test(_one_run.outcomes(in_scores, out_scores), delta)
    return test(curve, LEVEL) is not None


def independent(in_scores, out_scores, curve, method="plan"):
    trials = _independent.trials(in_scores, out_scores)
    return _bounds._independent_test(trials, method)(curve, LEVEL) is not None


def times_refuted(draw, is_refuted, num_canaries=150, num_runs=NUM_RUNS, seed=0):
    rng = np.random.default_rng(seed)
    return sum(is_refuted(*draw(rng, num_canaries)) for _ in range(num_runs))


RESPONSE = EpsilonDeltaCurve(1.0, 0.05)


@pytest.mark.parametrize(
    ("draw", "curve", "test"),
    [
        (gaussian, GaussianCurve(1.0), one_run),
        (gaussian, GaussianCurve(1.0), independent),
        (gaussian, EpsilonDeltaCurve(GaussianCurve(1.0).epsilon(0.05), 0.05), one_run),
        (randomized_response, RESPONSE, one_run),
        (randomized_response, RESPONSE, independent),
        (
            randomized_response,
            RESPONSE,
            lambda *arguments: independent(*arguments, method="epsilon_delta"),
        ),
        (all_or_none, ALL_OR_NONE, one_run),
        (all_or_none, EpsilonDeltaCurve(0.0, 0.2), lambda *args: one_run(*args, delta=0.2)),
    ],
)
def test_the_bound_of_a_correct_run_exceeds_its_epsilon_as_rarely_as_stated(draw, curve, test):
    found = times_refuted(draw, lambda *scores: test(*scores, curve))
    print(f"{found} of {NUM_RUNS} bounds exceed epsilon, {TOLERANCE} are tolerated")
    assert found <= TOLERANCE


def test_independent_bounds_are_wrong_for_canaries_that_are_revealed_together():
    # So this assumption is stated with each bound that makes it.
    found = times_refuted(all_or_none, lambda *scores: independent(*scores, ALL_OR_NONE))
    assert found > TOLERANCE


def test_a_choice_that_is_not_paid_for_is_found_out():
    def best_number_of_guesses(in_scores, out_scores):
        is_in = np.arange(len(in_scores) + len(out_scores)) < len(in_scores)
        right = np.cumsum(is_in[np.argsort(-np.concatenate([in_scores, out_scores]))])
        return any(
            _one_run.epsilon_delta_is_refuted(
                _one_run.Outcome(150, number, int(right[number - 1]), True, 1.0), 0.0, 1e-9, LEVEL
            )
            for number in range(5, 75)
        )

    found = times_refuted(lambda rng, number: gaussian(rng, number, 0.0), best_number_of_guesses)
    assert found > TOLERANCE


def test_a_tie_is_no_success():
    scores = np.ones(200), np.ones(200)
    for outcome in _one_run.outcomes(*scores):
        assert outcome.num_correct == 0
    trials = _independent.trials(*scores)
    assert (trials.found, trials.wrong, trials.num_correct) == (0, 0, 180)


def test_thresholds_come_from_canaries_that_are_not_guessed_about():
    rng = np.random.default_rng(0)
    in_scores, out_scores = rng.normal(size=100) + 1, rng.normal(size=100)
    held_in, held_out = (_independent.is_held_out(name, 100) for name in ("in", "out"))
    assert held_in.sum() == held_out.sum() == 10
    # Whatever the others score, the thresholds are the same, and all guesses are right, or wrong.
    for shift, correct in ((100, 180), (-100, 0)):
        trials = _independent.trials(
            np.where(held_in, in_scores, shift), np.where(held_out, out_scores, -shift)
        )
        assert trials.num_correct == correct
        assert (trials.found, trials.wrong) == ((90, 0) if correct else (0, 90))


SAMPLER = dpoptax.samplers.Poisson(400, 40, 400)
PLAN = dpoptax.Plan(sampler=SAMPLER, clip=1.0, noise_multiplier=1.0, num_steps=60, delta=1e-4)


def plan_scores(rng, num_canaries, noise=1.0):
    """The sum over all steps of what one coordinate of a canary's own releases."""
    is_in = rng.random(num_canaries) < 0.5
    batches = rng.binomial(PLAN.num_steps, 0.1, num_canaries)
    scores = batches * is_in + noise * np.sqrt(PLAN.num_steps) * rng.normal(size=num_canaries)
    return split(scores, is_in)


def test_the_family_of_a_plan_holds_for_its_own_runs_and_finds_too_little_noise():
    curve = plan_family(PLAN, PLAN.num_steps, {}).curve(0.0)
    assert curve.epsilon(PLAN.delta) == pytest.approx(PLAN.epsilon())
    for test in (one_run, independent):
        found = times_refuted(plan_scores, lambda *s, test=test: test(*s, curve), num_runs=200)
        assert found <= scipy.stats.binom.ppf(1 - 1e-4, 200, LEVEL)
    rng = np.random.default_rng(1)
    for _ in range(20):
        assert independent(*plan_scores(rng, 1000, noise=0.5), curve)


def mu_at(epsilon):
    """The mu of mu-GDP with this epsilon at delta 1e-4."""
    return scipy.optimize.brentq(lambda mu: GaussianCurve(mu).epsilon(1e-4) - epsilon, 0.01, 20)


def test_a_lower_bound_is_the_last_epsilon_that_is_refuted():
    rng = np.random.default_rng(2)
    scores = gaussian(rng, 500, 2.0)
    settings = {"delta": 1e-4, "confidence": 0.95}
    for is_independent in (True, False):
        for method, family in (
            ("gaussian", gaussian_family()),
            ("epsilon_delta", epsilon_delta_family(1e-4)),
        ):
            bound = _bounds.lower_bound(
                *scores, family, method=method, independent=is_independent, **settings
            )
            if is_independent:
                test = _bounds._independent_test(_independent.trials(*scores), method)
            else:
                test = _bounds._one_run_test(_one_run.outcomes(*scores), 1e-4)

            # On both sides of the bound.
            for shift, refuted in ((-1e-3, True), (1e-3, False)):
                curve = EpsilonDeltaCurve(bound.epsilon + shift, 1e-4)
                if method == "gaussian":
                    curve = GaussianCurve(mu_at(bound.epsilon + shift))
                assert (test(curve, LEVEL) is not None) == refuted
            assert 0.5 < bound.epsilon < GaussianCurve(2.0).epsilon(1e-4)
            assert bound.num_correct <= bound.num_guesses <= bound.num_canaries == 500


def epsilons(num_canaries, num_runs, is_independent):
    mu = 0.9249  # epsilon 4 at delta 1e-5
    assert GaussianCurve(mu).epsilon(1e-5) == pytest.approx(4.0, abs=1e-3)
    rng = np.random.default_rng(3)
    return np.array(
        [
            _bounds.lower_bound(
                *gaussian(rng, num_canaries, mu),
                gaussian_family(),
                delta=1e-5,
                confidence=0.95,
                method="gaussian",
                independent=is_independent,
            ).epsilon
            for _ in range(num_runs)
        ]
    )


def test_a_thousand_independent_canaries_reach_most_of_epsilon():
    found = epsilons(1000, 100, is_independent=True)
    print(f"mean {found.mean():.2f}, at least 2.8 in {(found >= 2.8).mean():.0%}")
    assert found.mean() > 0.75 * 4
    assert (found >= 0.7 * 4).mean() > 0.7


def test_without_independence_a_thousand_canaries_reach_half_of_epsilon():
    found = epsilons(1000, 20, is_independent=False)
    print(f"mean {found.mean():.2f}")
    assert 0.45 * 4 < found.mean() < 0.75 * 4


@pytest.mark.parametrize("is_independent", [True, False])
@pytest.mark.parametrize("method", ["gaussian", "epsilon_delta"])
def test_too_few_canaries_are_refused_with_the_number_that_is_enough(is_independent, method):
    family = gaussian_family() if method == "gaussian" else epsilon_delta_family(1e-5)

    def perfect(number, confidence):
        scores = np.ones(number // 2), np.zeros(number - number // 2)
        return _bounds.lower_bound(
            *scores,
            family,
            delta=1e-5,
            confidence=confidence,
            method=method,
            independent=is_independent,
        )

    for confidence in (0.95, 0.999):
        with pytest.raises(ValueError, match=r"at least \d+ canaries for 9") as refusal:
            perfect(4, confidence)
        needed = int(str(refusal.value).split("at least ")[1].split()[0])
        assert perfect(needed, confidence).epsilon > 0
        with pytest.raises(ValueError, match=f"at least {needed} canaries"):
            perfect(needed - 1, confidence)


def test_counts_that_fair_coins_do_not_give_are_refused():
    scores = np.arange(90.0), np.arange(10.0)
    settings = {"delta": 1e-5, "confidence": 0.95, "method": "gaussian"}
    with pytest.raises(ValueError, match="fair coin"):
        _bounds.lower_bound(*scores, gaussian_family(), independent=False, **settings)
    # Runs of their own may be as many as one likes. The part that is in is taken into account.
    bound = _bounds.lower_bound(*scores, gaussian_family(), independent=True, **settings)
    assert bound.epsilon >= 0


def test_unequal_numbers_in_and_out_are_no_success():
    # Always to answer "in" is right in 90 % of these cases.
    rng = np.random.default_rng(4)
    settings = {"delta": 1e-5, "confidence": 0.95, "method": "gaussian", "independent": True}
    for _ in range(20):
        scores = rng.normal(size=900), rng.normal(size=100)
        assert _bounds.lower_bound(*scores, gaussian_family(), **settings).epsilon < 0.7
