"""Families of trade-off curves: how well each of them lets an attacker tell "in" from "out".

A trade-off curve says how large the true positive rate of an attack can be at a false positive
rate. A lower bound on epsilon is found by testing the curves of a family, from the most private one
on, until a curve is no longer refuted (Dong, Roth, Su 2019, arXiv:1905.02383).
"""

import math
import warnings
from typing import Protocol

import attrs
import numpy as np
import scipy.special

from dpoptax._plan import Plan
from dpoptax.accounting._epsilon import PrivacyLoss, event_privacy_loss, run_event
from dpoptax.schedules import Schedule, as_schedule

# A curve of a plan is used at this many points. Each of them is a bound of its own.
NUM_POINTS = 1000
SMALLEST_DELTA = 1e-10
# The noise of a plan is divided and multiplied by at most this.
LARGEST_FACTOR = 32.0
# Bisections stop at these distances. The refuted end is the answer, so that a coarse search costs
# tightness only.
TOLERANCE, PLAN_TOLERANCE = 1e-4, 4e-3


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


class Family(Protocol):
    """Curves from a private one at `least` to a revealing one at `most`.

    A search begins at `start`.
    """

    start: float
    least: float
    most: float
    tolerance: float
    assumption: str

    def curve(self, position: float) -> Curve:
        """Returns the curve at a position between `least` and `most`."""
        ...


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


class Gaussian:
    """mu-GDP, by mu."""

    start, least, most, tolerance = 0.0, 0.0, 40.0, TOLERANCE
    assumption = "The run is as private as one release with Gaussian noise, for some noise."

    def curve(self, position: float) -> GaussianCurve:
        """See `Family`."""
        return GaussianCurve(position)


@attrs.frozen
class EpsilonDelta:
    """(epsilon, delta)-privacy at one delta, by epsilon."""

    at_delta: float
    start: float = 0.0
    least: float = 0.0
    most: float = 50.0
    tolerance: float = TOLERANCE
    assumption: str = ""

    def curve(self, position: float) -> EpsilonDeltaCurve:
        """See `Family`."""
        return EpsilonDeltaCurve(position, self.at_delta)


@attrs.frozen
class OfPlan:
    """The curves of a plan with its noise divided by a factor, by the logarithm of the factor."""

    plan: Plan
    num_steps: int
    computed: dict[float, PlanCurve] = attrs.field(factory=dict)
    start: float = 0.0
    least: float = -math.log(LARGEST_FACTOR)
    most: float = math.log(LARGEST_FACTOR)
    tolerance: float = PLAN_TOLERANCE
    assumption: str = "The run is as private as its plan with some other noise multiplier."

    def curve(self, position: float) -> PlanCurve:
        """See `Family`."""
        if position not in self.computed:
            self.computed[position] = self._curve(position)
        return self.computed[position]

    def _curve(self, position: float) -> PlanCurve:
        loss = plan_loss(self.plan, self.num_steps, math.exp(-position))
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
