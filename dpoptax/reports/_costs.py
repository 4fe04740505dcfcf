"""Epsilons of a report: those of one run, or of a search that returns the best of several."""

import collections
import functools
import math

import dp_accounting
from dp_accounting import NeighboringRelation

from dpoptax._dp_events import count_passes
from dpoptax.accounting import Ledger, RandomRuns, event_epsilon, tuned
from dpoptax.accounting._correlated import strategy_of
from dpoptax.accounting._epsilon import (
    PrivacyLoss,
    coarse_epsilon,
    event_privacy_loss,
    general_group_epsilon,
)
from dpoptax.accounting._tuned import check_runs, of_runs, renyi_epsilon
from dpoptax.clipping._flat import check_sensitivity
from dpoptax.mechanisms.strategies import Cyclic, sensitivity
from dpoptax.relations import Relation, parse_relation
from dpoptax.schedules import as_schedule

# The distributions of groups are slow to compute. A grid eight times as coarse overstates their
# epsilon by about one percent.
GROUP_COARSENING = 8.0


class Costs:
    """What the charges of a ledger cost, alone or as a run of a search."""

    def __init__(self, ledger: Ledger, runs: RandomRuns | None) -> None:
        if runs is not None:
            check_runs(runs)
        self._ledger = ledger
        self._runs = runs
        self._relation = parse_relation(ledger.sampler.relation)

    def loss(self, delta: float) -> PrivacyLoss:
        """The privacy loss, computed for this delta."""
        if self._runs is None:
            event = self._ledger.event(self._relation)
            return event_privacy_loss(event, delta=delta, relation=self._relation)
        return of_runs(self._of_one_run(self._relation), self._runs, delta)

    def epsilon(self, delta: float) -> float:
        """The epsilon under the sampler's own relation."""
        return self._epsilon(delta, self._relation)

    def replace_one(self) -> float:
        """Epsilon under replace_one; inf if none is known of the rule, or of another release."""
        try:
            check_sensitivity(self._ledger.clip, "replace_one")
        except ValueError:
            return math.inf
        try:
            return self._epsilon(self._ledger.delta, NeighboringRelation.REPLACE_ONE)
        except dp_accounting.UnsupportedEventError:
            return math.inf

    def of_group(self, size: int) -> float:
        """The epsilon of a group of examples."""
        delta = self._ledger.delta
        if self._runs is not None:
            return general_group_epsilon(self.loss(delta), size, delta)
        return coarse_epsilon(
            self._ledger.event(self._relation),
            delta=delta,
            relation=self._relation,
            group_size=size,
            coarsening=GROUP_COARSENING,
        )

    def unamplified(self) -> float:
        """Epsilon if each unit were used once per pass over the data, at a publicly known step."""
        ledger = self._ledger
        if ledger.num_steps == 0:
            return 0.0
        sampler = ledger.sampler
        largest = as_schedule(sampler.expected_batch_size).max
        steps_per_pass = max(math.floor(sampler.num_examples / largest), 1)
        strategy = strategy_of(ledger.mechanism)
        counts: collections.Counter[float] = collections.Counter()
        for noise, num_steps in ledger.runs:
            if strategy is None:
                counts.update(count_passes(noise, num_steps, steps_per_pass))
            else:
                # One release of all steps, which an example moves by more than one clip bound.
                moves = sensitivity(strategy, Cyclic(steps_per_pass), num_steps)
                counts[as_schedule(noise).min / moves] += 1
        if min(counts) == 0:
            return math.inf
        # Gaussian releases compose to one Gaussian, whose precision is the sum of theirs.
        # Relative to the least noise, no square overflows.
        least = min(counts)
        precision = sum(count * (least / noise) ** 2 for noise, count in counts.items())
        event = dp_accounting.GaussianDpEvent(least / math.sqrt(precision))
        if self._runs is not None:
            return tuned(event, self._runs, delta=ledger.delta)
        return event_epsilon(event, delta=ledger.delta)

    def _epsilon(self, delta: float, relation: Relation) -> float:
        if self._runs is None:
            return self._ledger.epsilon(delta, relation)
        searched = of_runs(self._of_one_run(relation), self._runs, delta).epsilon(delta)
        event = self._ledger.event(relation)
        return min(searched, renyi_epsilon(event, self._runs, delta, relation))

    @functools.cache  # noqa: B019 - this object lives as long as one report is made
    def _of_one_run(self, relation: Relation) -> PrivacyLoss:
        """The privacy loss of one run, for the smallest delta of a report."""
        assert self._runs is not None
        smallest = self._ledger.delta / 10 / self._runs.mean
        return event_privacy_loss(self._ledger.event(relation), delta=smallest, relation=relation)
