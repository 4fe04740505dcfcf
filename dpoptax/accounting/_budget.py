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
from dpoptax.accounting._epsilon import coarse_epsilon, resolve_relation, run_event
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.relations import Relation
from dpoptax.samplers import Sampler
from dpoptax.schedules import as_schedule


def _epsilon(value: Any) -> float:
    return _validate.positive("epsilon", value)


def _delta(value: Any) -> float:
    return _validate.open_unit("delta", value)


@attrs.frozen
class Budget:
    """The epsilon and delta that a run must keep, and the neighbouring relation if one is named.

    They also pay for `earlier`, the event of other releases on the same data. The `mechanism` is
    that of the run.
    """

    epsilon: float = attrs.field(converter=_epsilon)
    delta: float = attrs.field(converter=_delta)
    relation: Relation | None
    earlier: dp_accounting.DpEvent | None = None
    mechanism: AnyMechanism = Gaussian()

    def cost(
        self, sampler: Sampler, noise_multiplier: float, num_steps: int, coarsening: float = 1.0
    ) -> float:
        """Returns the epsilon of a run at this delta."""
        # Resolved here, for calibrate_batch_size makes a new sampler for each size.
        relation = resolve_relation(self.relation, sampler.relation)
        event = run_event(sampler, noise_multiplier, num_steps, relation, self.mechanism)
        if self.earlier is not None:
            event = dp_accounting.ComposedDpEvent([self.earlier, event])
        return coarse_epsilon(event, delta=self.delta, relation=relation, coarsening=coarsening)

    def excess(self, cost: float) -> float:
        """Returns log(cost / epsilon), at most zero where the budget is kept."""
        # Finite also where epsilon is zero or infinite, as the searches interpolate.
        return math.log(max(cost, 1e-12) / self.epsilon) if cost < math.inf else 1e3

    def largest(self, cost: Callable[[int], float], guess: float, highest: int) -> int:
        """Returns the largest whole number whose cost is within the budget; 0 if there is none."""
        return search.largest_feasible(lambda number: self.excess(cost(number)), guess, highest)

    def out_of_reach(self, why: str) -> ValueError:
        """Returns the error that says what the best choice would cost."""
        return ValueError(
            f"epsilon = {self.epsilon:g} at delta = {self.delta:g} is out of reach: {why}"
        )

    def gaussian_mu(self) -> float:
        """The mu at which a Gaussian mechanism has exactly this epsilon and delta."""
        import scipy.optimize  # slow to import

        def excess_delta(mu: float) -> float:
            gap = -self.epsilon / mu
            tail = math.exp(min(self.epsilon + scipy.special.log_ndtr(gap - mu / 2), 0.0))
            return float(scipy.special.ndtr(gap + mu / 2) - tail - self.delta)

        return float(
            scipy.optimize.brentq(excess_delta, self.delta, self.epsilon + 50.0, xtol=1e-15)
        )


def spread(noise_multiplier: float) -> float:
    """sqrt(exp(1 / noise_multiplier**2) - 1), cut off where the exponential overflows."""
    return math.sqrt(math.expm1(min(noise_multiplier**-2, 700.0)))


def sampling_rate(sampler: Sampler) -> float:
    """The largest probability that an example takes part in a step."""
    return as_schedule(sampler.expected_batch_size).max / sampler.num_examples


def first_log_noise(budget: Budget, sampler: Sampler, num_steps: int) -> float:
    """The logarithm of the noise multiplier at which mu meets the budget."""
    rate = sampling_rate(sampler)
    return -0.5 * math.log(math.log1p((budget.gaussian_mu() / rate) ** 2 / num_steps))
