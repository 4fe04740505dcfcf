"""RDP privacy filter: admits adaptively chosen releases while a fixed budget lasts."""

import math

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from dpoptax import _validate
from dpoptax.accounting._normalize_event import OVERFLOW_FRACTION
from dpoptax.accounting._renyi import renyi_steps
from dpoptax.relations import Relation, parse_relation


class BudgetSpentError(RuntimeError):
    """A release was refused, because it would exceed the budget.

    Example:
        >>> import dp_accounting
        >>> budget = RdpFilter(epsilon=0.1, delta=1e-5)
        >>> try:
        ...     budget.charge(dp_accounting.GaussianDpEvent(1.0))
        ... except BudgetSpentError:
        ...     print("stop here")
        stop here
    """


class RdpFilter:
    """A budget for releases that may each be chosen after seeing the earlier ones.

    If noise, rate or number of steps depend on earlier outputs, it is not valid to compose privacy
    loss distributions and to stop once epsilon is reached. With Rényi divergences of one order,
    fixed in advance, it is valid: a release is admitted while their sum stays within the budget.

    The filter is looser than a plan. Prefer a plan, with a schedule fixed in advance, if you can.

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
        """Creates a filter with nothing spent.

        Args:
            epsilon: the budget, positive.
            delta: strictly between 0 and 1.
            relation: add_or_remove_one or replace_special.
            order: of the Rényi divergence, above 1; None for the order that is best if all releases
                are Gaussian.

        Raises:
            ValueError: a number is out of range; or the relation is replace_one, under which
                dp-accounting's Rényi accountant understates the cost of sums.
        """
        self.epsilon: float = _validate.positive("epsilon", epsilon)
        self.delta: float = _validate.open_unit("delta", delta)
        self.relation: dp_accounting.NeighboringRelation = parse_relation(relation)
        if self.relation == NeighboringRelation.REPLACE_ONE:
            raise ValueError(
                "relation must be add_or_remove_one or replace_special for a Rényi filter; got "
                "replace_one. Fix the schedule in advance and use a Plan, which accounts it."
            )
        if order is None:
            # The order that minimises the epsilon of a Gaussian which spends the whole budget.
            log_delta = -math.log(self.delta)
            root = math.sqrt(self.epsilon + log_delta) - math.sqrt(log_delta)
            order = 1 + math.sqrt(log_delta) / root
        self.order: float = _validate.positive("order", order)
        if self.order <= 1:
            raise ValueError(f"order must be above 1; got {self.order}.")
        self._charged: list[dp_accounting.DpEvent] = []
        self._overflow = 0.0

    def admits(self, event: dp_accounting.DpEvent) -> bool:
        """Returns whether the budget suffices for one more release.

        Raises:
            dp_accounting.UnsupportedEventError: no Rényi divergence is known of the event.
        """
        steps, overflow = renyi_steps(event, self.delta, (self.order,))
        # Overflow that fits on its own may be too much in sum.
        if self._overflow + overflow > OVERFLOW_FRACTION * self.delta:
            return False
        return self._epsilon(self._accountant_of([*self._charged, *steps])) <= self.epsilon

    def charge(self, event: dp_accounting.DpEvent) -> None:
        """Counts a release. Call it before the release leaves the program.

        Raises:
            BudgetSpentError: the budget does not suffice; nothing is counted.
            dp_accounting.UnsupportedEventError: no Rényi divergence is known of the event.
        """
        if not self.admits(event):
            raise BudgetSpentError(
                f"this release would exceed epsilon = {self.epsilon:g} at delta = {self.delta:g}, "
                f"of which {self.spent():.4g} is spent. Stop here, or add more noise."
            )
        steps, overflow = renyi_steps(event, self.delta, (self.order,))
        self._overflow += overflow
        self._charged = _merged([*self._charged, *steps])

    def spent(self) -> float:
        """Returns the epsilon of everything that was charged."""
        return self._epsilon(self._accountant_of(self._charged)) if self._charged else 0.0

    def _accountant_of(self, steps: list[dp_accounting.DpEvent]) -> RdpAccountant:
        accountant = RdpAccountant([self.order], self.relation)
        for step in steps:
            accountant.compose(step)
        return accountant

    def _epsilon(self, accountant: RdpAccountant) -> float:
        # The rest of delta is reserved for batches that overflow.
        return float(accountant.get_epsilon(self.delta * (1 - OVERFLOW_FRACTION)))


def _merged(steps: list[dp_accounting.DpEvent]) -> list[dp_accounting.DpEvent]:
    """Adds up the counts of equal steps."""
    counts: dict[dp_accounting.DpEvent, int] = {}
    for step in steps:
        count = 1
        if isinstance(step, dp_accounting.SelfComposedDpEvent):
            step, count = step.event, step.count
        counts[step] = counts.get(step, 0) + count
    return [dp_accounting.SelfComposedDpEvent(step, count) for step, count in counts.items()]
