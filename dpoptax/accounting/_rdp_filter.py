"""A budget and releases that may depend on one another in; which of them still fit in out."""

import math

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from dpoptax import _validate
from dpoptax._dp_events import KnownMixtureDpEvent
from dpoptax.accounting._normalize_event import OVERFLOW_SHARE, pieces
from dpoptax.relations import Relation, parse_relation


class BudgetSpentError(RuntimeError):
    """A release was refused: it would have exceeded the budget."""


class RdpFilter:
    """A budget for releases of which each may be chosen after seeing the ones before.

    Where noise, rate or number of steps depend on earlier outputs, privacy loss distributions must
    not be composed and watched until epsilon is reached. Rényi divergences at an order fixed in
    advance may be: a release is admitted while their sum stays within the budget.

    It is looser than a plan: prefer one, with a schedule fixed in advance, where you can.

    Example:
        >>> import dp_accounting
        >>> budget = RdpFilter(epsilon=1.0, delta=1e-5)
        >>> release = dp_accounting.GaussianDpEvent(10.0)
        >>> admitted = 0
        >>> while budget.admits(release):
        ...     budget.charge(release)  # then release, look, and choose the next
        ...     admitted += 1
        >>> admitted, budget.spent() <= 1.0
        (5, True)

    Reference: Feldman and Zrnic 2021, arXiv:2008.11193; arXiv:2602.06756 on what is not valid.
    """

    def __init__(
        self,
        *,
        epsilon: float,
        delta: float,
        relation: Relation = "add_or_remove_one",
        order: float | None = None,
    ) -> None:
        """Fixes the budget and the order.

        Args:
            epsilon: the budget, positive.
            delta: strictly between 0 and 1.
            relation: add_or_remove_one or replace_special.
            order: of the Rényi divergence, above 1; None for the best one if all releases were
                Gaussian.

        Raises:
            ValueError: a number out of range; replace_one, under which dp-accounting's Rényi
                accountant takes sums for twice as private as they are.
        """
        self.epsilon = _validate.positive("epsilon", epsilon)
        self.delta = _validate.open_unit("delta", delta)
        self.relation = parse_relation(relation)
        if self.relation == NeighboringRelation.REPLACE_ONE:
            raise ValueError(
                "a Rényi filter is for add_or_remove_one or replace_special; got replace_one. "
                "Fix the schedule in advance and use a Plan, which accounts it."
            )
        if order is None:
            log_delta = -math.log(self.delta)
            root = math.sqrt(self.epsilon + log_delta) - math.sqrt(log_delta)
            order = 1 + math.sqrt(log_delta) / root
        self.order = _validate.positive("order", order)
        if self.order <= 1:
            raise ValueError(f"order must be above 1; got {self.order}.")
        self._charged: list[dp_accounting.DpEvent] = []
        self._overflow = 0.0

    def admits(self, event: dp_accounting.DpEvent) -> bool:
        """Whether the budget holds one more release.

        Raises:
            dp_accounting.UnsupportedEventError: an event without a known Rényi divergence.
        """
        steps, overflow = self._steps(event)
        if self._overflow + overflow > OVERFLOW_SHARE * self.delta:
            return False
        return self._epsilon(self._accountant_of([*self._charged, *steps])) <= self.epsilon

    def charge(self, event: dp_accounting.DpEvent) -> None:
        """Counts a release, before it leaves the program.

        Raises:
            BudgetSpentError: the budget does not hold it; nothing is counted.
            dp_accounting.UnsupportedEventError: an event without a known Rényi divergence.
        """
        if not self.admits(event):
            raise BudgetSpentError(
                f"this release would exceed epsilon = {self.epsilon:g} at delta = {self.delta:g}, "
                f"of which {self.spent():.4g} is spent. Stop here, or release with more noise."
            )
        steps, overflow = self._steps(event)
        self._overflow += overflow
        self._charged = _merged([*self._charged, *steps])

    def spent(self) -> float:
        """Returns the epsilon of what was charged."""
        return self._epsilon(self._accountant_of(self._charged)) if self._charged else 0.0

    def _steps(self, event: dp_accounting.DpEvent) -> tuple[list[dp_accounting.DpEvent], float]:
        found = pieces(event, delta=self.delta, relation=self.relation)
        assert found is not None  # only groups can be unknown
        if not found.private:
            return [dp_accounting.NonPrivateDpEvent()], 0.0
        steps = []
        for step, count in found.counts.items():
            match step:
                case dp_accounting.SampledWithoutReplacementDpEvent(
                    source_dataset_size=size,
                    sample_size=sample,
                    event=dp_accounting.GaussianDpEvent(noise_multiplier=noise),
                ):
                    # One example evicts another: a move of twice the clip bound.
                    gaussian = dp_accounting.GaussianDpEvent(noise / 2)
                    step = dp_accounting.PoissonSampledDpEvent(sample / size, gaussian)
                case KnownMixtureDpEvent(rare=rare):  # always: a bound
                    step = rare
            steps.append(dp_accounting.SelfComposedDpEvent(step, count))
        return steps, found.overflow

    def _accountant_of(self, steps: list[dp_accounting.DpEvent]) -> RdpAccountant:
        accountant = RdpAccountant([self.order], self.relation)
        for step in steps:
            accountant.compose(step)
        return accountant

    def _epsilon(self, accountant: RdpAccountant) -> float:
        return float(accountant.get_epsilon(self.delta * (1 - OVERFLOW_SHARE)))


def _merged(steps: list[dp_accounting.DpEvent]) -> list[dp_accounting.DpEvent]:
    """Adds up the counts of equal steps."""
    counts: dict[dp_accounting.DpEvent, int] = {}
    for step in steps:
        count = 1
        if isinstance(step, dp_accounting.SelfComposedDpEvent):
            step, count = step.event, step.count
        counts[step] = counts.get(step, 0) + count
    return [dp_accounting.SelfComposedDpEvent(step, count) for step, count in counts.items()]
