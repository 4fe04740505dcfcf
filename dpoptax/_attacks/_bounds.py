"""The lower bound on epsilon of an audit: a test, inverted over a family of trade-off curves."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import scipy.special

from dpoptax import _validate
from dpoptax._attacks import _independent, _one_run
from dpoptax._attacks._curves import (
    Curve,
    EpsilonDeltaCurve,
    Family,
    GaussianCurve,
    PlanCurve,
    epsilon_delta_family,
    gaussian_family,
    plan_family,
)
from dpoptax._attacks._lower_bound import LowerBound
from dpoptax._plan import Plan
from dpoptax.reports._attack import as_percent

Method: TypeAlias = Literal["plan", "gaussian", "epsilon_delta"]
METHODS = ("plan", "gaussian", "epsilon_delta")

FAIR_COINS = "Each canary was in by a separate fair coin."
INDEPENDENT = "The scores of the canaries are independent of each other, given who was in."
# Counts of canaries that are in are refused as not from fair coins at this probability.
IMPOSSIBLE = 1e-6
MOST_CANARIES_NEEDED = 1000
# Of the search for the curve.
FIRST_STEP = 0.1


class Refuted(NamedTuple):
    """The guesses that refuted a curve."""

    num_guesses: int
    num_correct: int


# From a curve and the probability of a wrong bound to what refuted the curve.
Test: TypeAlias = Callable[[Curve, float], Refuted | None]


def family_of(method: Method, plan: Plan, num_steps: int, curves: dict[float, PlanCurve]) -> Family:
    """Returns the family of a method. Curves of the plan are kept in `curves`."""
    if method == "plan":
        return plan_family(plan, num_steps, curves)
    return gaussian_family() if method == "gaussian" else epsilon_delta_family(plan.delta)


def lower_bound(
    in_scores: np.ndarray,
    out_scores: np.ndarray,
    family: Family,
    *,
    delta: float,
    confidence: float,
    method: Method,
    independent: bool,
) -> LowerBound:
    """Returns the lower bound on epsilon that scores show."""
    level = 1 - _validate.open_unit("confidence", confidence)
    number = len(in_scores) + len(out_scores)
    _check_number(number, delta, level, method, independent)
    if independent:
        outcome = _independent.trials(in_scores, out_scores)
        test = _independent_test(outcome, method)
        guesses = outcome.num_in + outcome.num_out, outcome.num_correct
    else:
        _check_coins(len(in_scores), len(out_scores))
        found = _one_run.outcomes(in_scores, out_scores)
        test = _one_run_test(found, delta)
        guesses = found[0].num_guesses, found[0].num_correct
    refuted = _last_refuted(family, test, level)
    epsilon = 0.0
    if refuted is not None:
        curve, guesses = refuted
        epsilon = curve.epsilon(delta)
    if math.isinf(epsilon):
        raise ValueError(
            f"expected a plan with a finite epsilon at delta {delta:g}; got inf, because batches "
            "overflow too often. Pass method='gaussian'."
        )
    assumptions = (INDEPENDENT if independent else FAIR_COINS, family.assumption)
    return LowerBound(
        epsilon=epsilon,
        delta=delta,
        confidence=confidence,
        method=method,
        assumptions=tuple(text for text in assumptions if text),
        num_canaries=number,
        num_guesses=guesses[0],
        num_correct=guesses[1],
    )


def _independent_test(outcome: _independent.Trials, method: Method) -> Test:
    of_accuracy, of_rates = _independent.SHARES[method == "epsilon_delta"]

    def test(curve: Curve, level: float) -> Refuted | None:
        if _independent.accuracy_is_refuted(outcome, curve, of_accuracy * level):
            return Refuted(outcome.num_in + outcome.num_out, outcome.num_correct)
        if _independent.rates_are_refuted(outcome, curve, of_rates * level):
            return Refuted(outcome.found + outcome.wrong, outcome.found)
        return None

    return test


def _one_run_test(outcomes: list[_one_run.Outcome], delta: float) -> Test:
    def test(curve: Curve, level: float) -> Refuted | None:
        for outcome in outcomes:
            share = outcome.share * level
            if isinstance(curve, EpsilonDeltaCurve):
                refuted = _one_run.epsilon_delta_is_refuted(outcome, curve.at_epsilon, delta, share)
            else:
                refuted = _one_run.curve_is_refuted(outcome, curve, share)
            if refuted:
                return Refuted(outcome.num_guesses, outcome.num_correct)
        return None

    return test


def _last_refuted(family: Family, test: Test, level: float) -> tuple[Curve, Refuted] | None:
    """Returns the most revealing curve that is refuted."""
    last = None

    def refutes(position: float) -> bool:
        nonlocal last
        curve = family.curve(position)
        found = test(curve, level)
        if found is not None:
            last = curve, found
        return found is not None

    # Curves far from the answer are slow to compute, so we bracket it by steps that double.
    low = high = family.start
    step = FIRST_STEP
    if refutes(family.start):
        while low == high:
            high = min(low + step, family.most)
            if refutes(high):
                if high == family.most:
                    return last
                low, step = high, 2 * step
    else:
        while low == high:
            if high == family.least:
                return None
            low = max(high - step, family.least)
            if not refutes(low):
                high, step = low, 2 * step
    while high - low > family.tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if refutes(middle) else (low, middle)
    return last


def _check_coins(num_in: int, num_out: int) -> None:
    """Raises if fair coins would hardly ever give these numbers."""
    total = num_in + num_out
    tail = 2 * float(scipy.special.bdtr(min(num_in, num_out), total, 0.5))
    if tail < IMPOSSIBLE:
        raise ValueError(
            "expected canaries that were each in by a fair coin; got "
            f"{num_in:,} in and {num_out:,} out. Pass the scores of all canaries. If each score "
            "comes from a separate run, pass independent=True."
        )


def _check_number(
    num_canaries: int, delta: float, level: float, method: Method, independent: bool
) -> None:
    """Raises if an attack that is always right would show nothing."""
    if _perfect_is_seen(num_canaries, delta, level, method, independent):
        return
    numbers = range(num_canaries + 1, MOST_CANARIES_NEEDED)
    enough = next(
        (n for n in numbers if _perfect_is_seen(n, delta, level, method, independent)), None
    )
    if enough is None:
        raise ValueError(
            f"expected enough canaries for {as_percent(1 - level)} confidence at delta {delta:g}; "
            f"got {num_canaries:,}, and {MOST_CANARIES_NEEDED:,} are too few. Ask for a lower "
            "confidence."
        )
    raise ValueError(
        f"expected at least {enough:,} canaries for {as_percent(1 - level)} confidence, because "
        "with fewer even an attack that is always right shows no epsilon above 0; got "
        f"{num_canaries:,}. Audit with more canaries, or ask for a lower confidence. A useful "
        "bound needs some hundreds."
    )


def _perfect_is_seen(
    num_canaries: int, delta: float, level: float, method: Method, independent: bool
) -> bool:
    """Returns whether an attack that is always right would refute that nothing is revealed."""
    # For each method: the curve of a release that depends on no canary.
    nothing: Curve = GaussianCurve(0.0)
    if method == "epsilon_delta":
        nothing = EpsilonDeltaCurve(0.0, delta)
    if num_canaries < 2:
        return False
    if independent:
        test = _independent_test(_independent.perfect_trials(num_canaries), method)
    else:
        test = _one_run_test(_one_run.perfect_outcomes(num_canaries), delta)
    return test(nothing, level) is not None
