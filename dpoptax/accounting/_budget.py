"""Privacy budget of a calibration, and where to start the search.

First guesses come from the central limit theorem: many small steps together are about as private as
one Gaussian mechanism with (Bu et al. 2020, arXiv:1911.11607)

    mu = sampling_rate * sqrt(num_steps * (exp(1 / noise_multiplier**2) - 1)).
"""

import math
from collections.abc import Callable
from typing import Any

import attrs
import dp_accounting

from dpoptax import _validate
from dpoptax.accounting import _search as search
from dpoptax.accounting._attack_risk import AttackRisk, mu_of_epsilon
from dpoptax.accounting._epsilon import (
    PrivacyLoss,
    coarse_epsilon,
    event_privacy_loss,
    resolve_relation,
    run_event,
)
from dpoptax.accounting._normalize_event import OVERFLOW_FRACTION
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.relations import Relation
from dpoptax.samplers import Sampler
from dpoptax.schedules import as_schedule

# A report reads what an attacker can do off a privacy loss that was computed for the delta of the
# guarantee divided by this.
REPORT_DIVISOR = 10


def _epsilon(value: Any) -> float | None:
    return None if value is None else _validate.positive("epsilon", value)


def _delta(value: Any) -> float:
    return _validate.open_unit("delta", value)


@attrs.frozen
class Budget:
    """What a run may cost: an epsilon at delta, or the risk of an attack.

    The budget also pays for `earlier`, the event of other releases on the same data. The
    `mechanism` is that of the run. A `relation` of None is that of the sampler.
    """

    epsilon: float | None = attrs.field(converter=_epsilon)
    delta: float = attrs.field(converter=_delta)
    relation: Relation | None
    earlier: dp_accounting.DpEvent | None = None
    mechanism: AnyMechanism = Gaussian()
    risk: AttackRisk | None = None

    def __attrs_post_init__(self) -> None:
        if (self.epsilon is None) == (self.risk is None):
            raise TypeError(
                f"give either epsilon or risk; got epsilon={_validate.described(self.epsilon)}, "
                f"risk={_validate.described(self.risk)}. Pass one of the two and leave out the "
                "other."
            )
        if self.risk is not None and not isinstance(self.risk, AttackRisk):
            raise TypeError(
                f"risk must be a limit on an attack; got {_validate.described(self.risk)}. Pass "
                "for example dpoptax.accounting.Advantage(0.1)."
            )

    @property
    def limit(self) -> float:
        """The largest cost that keeps the budget."""
        if self.risk is not None:
            return self.risk.limit
        assert self.epsilon is not None
        return self.epsilon

    @property
    def limit_name(self) -> str:
        """What an error calls the limit."""
        return "epsilon" if self.risk is None else "limit"

    def cost(
        self, sampler: Sampler, noise_multiplier: float, num_steps: int, coarsening: float = 1.0
    ) -> float:
        """Returns the epsilon of a run at this delta, or its bound on the risk."""
        event, relation = self._event(sampler, noise_multiplier, num_steps)
        if self.risk is None:
            return coarse_epsilon(event, delta=self.delta, relation=relation, coarsening=coarsening)

        def loss(delta: float) -> PrivacyLoss:
            return event_privacy_loss(event, delta=delta, relation=relation, coarsening=coarsening)

        of_plan = loss(self.delta)
        bound = self.risk.bound(of_plan, self.delta)
        # `Plan.privacy_loss` pays for overflow from delta. A report may not, and must show no more.
        of_report = self.delta / REPORT_DIVISOR
        if of_plan.overflow > OVERFLOW_FRACTION * of_report:
            bound = max(bound, self.risk.bound(loss(of_report), self.delta))
        return bound

    def epsilon_of(
        self, cost: float, sampler: Sampler, noise_multiplier: float, num_steps: int
    ) -> float:
        """Returns the epsilon of a run with this cost."""
        if self.risk is None:
            return cost
        event, relation = self._event(sampler, noise_multiplier, num_steps)
        return coarse_epsilon(event, delta=self.delta, relation=relation, coarsening=1.0)

    def _event(
        self, sampler: Sampler, noise_multiplier: float, num_steps: int
    ) -> tuple[dp_accounting.DpEvent, dp_accounting.NeighboringRelation]:
        # Resolved here, for calibrate_batch_size makes a new sampler for each size.
        relation = resolve_relation(self.relation, sampler.relation)
        event = run_event(sampler, noise_multiplier, num_steps, relation, self.mechanism)
        if self.earlier is not None:
            event = dp_accounting.ComposedDpEvent([self.earlier, event])
        return event, relation

    def excess(self, cost: float) -> float:
        """Returns log(cost / limit), at most zero where the budget is kept.

        A risk counts as the mu of the Gaussian mechanism that has it. That is, as epsilon, about a
        power of the noise, which the searches rely on.
        """
        limit = self.limit
        if self.risk is not None:
            cost, limit = (self.risk.gaussian_mu(value, self.delta) for value in (cost, limit))
        # Finite also where the cost is zero or infinite, as the searches interpolate.
        return math.log(max(cost, 1e-12) / limit) if cost < math.inf else 1e3

    def largest(self, cost: Callable[[int], float], guess: float, highest: int) -> int:
        """Returns the largest whole number whose cost is within the budget; 0 if there is none."""
        return search.largest_feasible(lambda number: self.excess(cost(number)), guess, highest)

    def out_of_reach(self, why: str) -> ValueError:
        """Returns the error that says what the best choice would cost."""
        wanted = f"epsilon = {self.epsilon:g}" if self.risk is None else str(self.risk)
        return ValueError(f"{wanted} at delta = {self.delta:g} is out of reach: {why}")

    def gaussian_mu(self) -> float:
        """The mu at which a Gaussian mechanism has exactly this cost, or about this belief."""
        if self.risk is not None:
            return self.risk.gaussian_mu(self.risk.limit, self.delta)
        return mu_of_epsilon(self.limit, self.delta)


def spread(noise_multiplier: float) -> float:
    """sqrt(exp(1 / noise_multiplier**2) - 1), cut off where it overflows or vanishes."""
    shift = min(max(1 / noise_multiplier, 1e-12), 26.0)
    return math.sqrt(math.expm1(shift**2))


def sampling_rate(sampler: Sampler) -> float:
    """The largest probability that an example takes part in a step."""
    return as_schedule(sampler.expected_batch_size).max / sampler.num_examples


def first_log_noise(budget: Budget, sampler: Sampler, num_steps: int) -> float:
    """The logarithm of the noise multiplier at which mu meets the budget."""
    rate = sampling_rate(sampler)
    return -0.5 * math.log(math.log1p((budget.gaussian_mu() / rate) ** 2 / num_steps))
