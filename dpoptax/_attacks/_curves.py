"""Families of trade-off curves: how well each of them lets an attacker tell "in" from "out".

A trade-off curve says how large the true positive rate of an attack can be at a false positive
rate. A lower bound on epsilon is found by testing the curves of a family, from the most private one
on, until a curve is no longer refuted (Dong, Roth, Su 2019, arXiv:1905.02383).
"""

import math
import warnings
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import attrs
import numpy as np
import scipy.special

from dpoptax._plan import Plan
from dpoptax.accounting._epsilon import PrivacyLoss, event_privacy_loss, run_event
from dpoptax.schedules import Schedule, as_schedule

# A curve of a plan is used at this many points. Each of them is a separate bound.
NUM_POINTS = 1000
SMALLEST_DELTA = 1e-10
# The noise of a plan is divided and multiplied by at most this.
LARGEST_FACTOR = 32.0
# Bisections stop at these distances. The refuted end is the answer, so that a coarse search costs
# tightness only.
TOLERANCE, PLAN_TOLERANCE = 1e-4, 4e-3


@runtime_checkable
class Curve(Protocol):
    """A trade-off curve, the same for "in" against "out" and for "out" against "in"."""

    def least_false_positive_rate(self, true_positive_rate: float) -> float:
        """Returns the smallest false positive rate of an attack with this true positive rate."""
        ...

    def delta(self, epsilon: float) -> float:
        """Returns the largest TPR - exp(epsilon) FPR of an attack."""
        ...

    def epsilon(self, delta: float) -> float:
        """Returns the smallest epsilon at a delta."""
        ...


@attrs.frozen
class Family:
    """Curves by position, from a private one at `least` to a revealing one at `most`.

    Attributes:
        curve: from a position to a curve.
        least: the first position.
        most: the last one.
        start: where a search begins.
        tolerance: how exactly a position is found.
        assumption: what is assumed of a run by using this family; may be empty.
    """

    curve: Callable[[float], Curve]
    least: float
    most: float
    start: float
    tolerance: float
    assumption: str


@attrs.frozen
class GaussianCurve:
    """The curve of one value released with Gaussian noise, mu-GDP."""

    mu: float

    def least_false_positive_rate(self, true_positive_rate: float) -> float:
        """See `Curve`."""
        return float(scipy.special.ndtr(scipy.special.ndtri(true_positive_rate) - self.mu))

    def delta(self, epsilon: float) -> float:
        """See `Curve`; corollary 2.13 of arXiv:1905.02383."""
        if self.mu == 0:
            return 0.0
        ratio = epsilon / self.mu
        found = scipy.special.ndtr(self.mu / 2 - ratio)
        return float(found - math.exp(epsilon + scipy.special.log_ndtr(-self.mu / 2 - ratio)))

    def epsilon(self, delta: float) -> float:
        """See `Curve`; rounded down."""
        if self.delta(0.0) <= delta:
            return 0.0
        low, high = 0.0, self.mu * (self.mu / 2 - float(scipy.special.ndtri(delta)))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.delta(middle) > delta else (low, middle)
        return low


@attrs.frozen
class EpsilonDeltaCurve:
    """The curve of everything that is (epsilon, delta)-private."""

    at_epsilon: float
    at_delta: float

    def least_false_positive_rate(self, true_positive_rate: float) -> float:
        """See `Curve`."""
        growth = math.exp(self.at_epsilon)
        missed = 1 - true_positive_rate
        return max(
            (true_positive_rate - self.at_delta) / growth, 1 - self.at_delta - growth * missed, 0.0
        )

    def delta(self, epsilon: float) -> float:
        """See `Curve`; the largest value is at the corner of the curve, or at a rate of zero."""
        growth = math.exp(self.at_epsilon)
        corner = (1 - self.at_delta) / (1 + growth)
        return max(1 - corner - math.exp(epsilon) * corner, self.at_delta)

    def epsilon(self, delta: float) -> float:
        """See `Curve`."""
        del delta
        return self.at_epsilon


@attrs.frozen
class PlanCurve:
    """The curve of a plan: the largest of many lines, each of which is an (epsilon, delta)."""

    loss: PrivacyLoss
    epsilons: np.ndarray
    deltas: np.ndarray

    def least_false_positive_rate(self, true_positive_rate: float) -> float:
        """See `Curve`."""
        found = (true_positive_rate - self.deltas) * np.exp(-self.epsilons)
        missed = 1 - self.deltas - np.exp(self.epsilons) * (1 - true_positive_rate)
        return max(float(found.max()), float(missed.max()), 0.0)

    def delta(self, epsilon: float) -> float:
        """See `Curve`; delta is convex in exp(epsilon), so that a chord is above it."""
        return float(np.interp(math.exp(epsilon), np.exp(self.epsilons), self.deltas))

    def epsilon(self, delta: float) -> float:
        """See `Curve`."""
        return self.loss.epsilon(delta)


def gaussian_family() -> Family:
    """mu-GDP, by mu."""
    return Family(
        curve=GaussianCurve,
        least=0.0,
        most=40.0,
        start=0.0,
        tolerance=TOLERANCE,
        assumption="The run is as private as one release with Gaussian noise, for some noise.",
    )


def epsilon_delta_family(delta: float) -> Family:
    """(epsilon, delta)-privacy at one delta, by epsilon."""
    return Family(
        curve=lambda epsilon: EpsilonDeltaCurve(epsilon, delta),
        least=0.0,
        most=50.0,
        start=0.0,
        tolerance=TOLERANCE,
        assumption="",
    )


def plan_family(plan: Plan, num_steps: int, computed: dict[float, PlanCurve]) -> Family:
    """The curves of a plan with its noise divided by a factor, by the logarithm of the factor.

    Those that are in `computed` are not computed again.
    """

    def curve(position: float) -> PlanCurve:
        if position not in computed:
            computed[position] = _plan_curve(plan_loss(plan, num_steps, math.exp(-position)))
        return computed[position]

    return Family(
        curve=curve,
        least=-math.log(LARGEST_FACTOR),
        most=math.log(LARGEST_FACTOR),
        start=0.0,
        tolerance=PLAN_TOLERANCE,
        assumption="The run is as private as its plan with some other noise multiplier.",
    )


def _plan_curve(loss: PrivacyLoss) -> PlanCurve:
    largest = loss.epsilon(max(SMALLEST_DELTA, 2 * loss.overflow))
    if math.isinf(largest):
        return PlanCurve(loss, np.zeros(1), np.ones(1))
    epsilons = np.linspace(0.0, min(largest, 700.0), NUM_POINTS)
    return PlanCurve(loss, epsilons, loss.deltas(epsilons))


def plan_loss(plan: Plan, num_steps: int, factor: float = 1.0) -> PrivacyLoss:
    """Returns the privacy loss of the first steps of a plan with its noise times a factor."""
    schedule = as_schedule(plan.noise_multiplier)
    noise = Schedule(tuple(factor * value for value in schedule.values), schedule.lengths)
    relation = plan.sampler.relation
    with warnings.catch_warnings():
        # Of numbers that nobody typed.
        warnings.simplefilter("ignore")
        event = run_event(plan.sampler, noise, num_steps, relation, plan.mechanism)
        return event_privacy_loss(event, delta=plan.delta, relation=relation)
