"""Epsilon of a search that makes a random number of private runs and returns the best one.

Let q be the probability that a run is at most as good as a given output, and q' the same on the
neighbouring data. With the probability generating function f of the number of runs, the search
returns an output y with density

    A(y) = Q(y) f'(q(y)),    with f' averaged over the outputs that are as good as y.

f' is at most f'(1), the mean. And 1 - q' <= e^e1 (1 - q) + delta_Q(e1) bounds the ratio of f'(q)
and f'(q') by e^shift, with

    shift = (1 + shape) log(e^e1 + (1/gamma - 1) delta_Q(e1))    for the negative binomial,
    shift = mean (e^e1 - 1 + delta_Q(e1))                        for Poisson,

for every e1 >= 0. So the delta of the search at epsilon is at most mean delta_Q(epsilon - shift).
This needs only the delta of one run at each epsilon, which our accountant has for every sampler
and relation (Koskela, Redberg and Wang 2024, arXiv:2402.06701). It is tighter than the Rényi
divergences of Papernot and Steinke (arXiv:2110.03620), but not for a large Poisson mean. There we
take the smaller of both.
"""

import math
from collections.abc import Sequence
from typing import Any

import attrs
import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from dpoptax import _validate
from dpoptax.accounting._epsilon import PrivacyLoss, event_privacy_loss, resolve_relation
from dpoptax.accounting._random_runs import RandomRuns
from dpoptax.accounting._renyi import renyi_steps
from dpoptax.relations import Relation

# How many values of e1 are tried; each is valid, so more only make the bound tighter.
NUM_TRIALS = 4000
# Orders of the Rényi divergence. Each gives a valid bound.
ORDERS = (*np.arange(1.1, 11, 0.1), *range(11, 64), 80, 100, 128, 192, 256, 512, 1024)


@attrs.frozen
class SearchLoss(PrivacyLoss):
    """The privacy loss of a search, from that of one run.

    Attributes:
        one_run: the privacy loss of one run.
        mean: the expected number of runs.
        shift: how far the number of runs moves epsilon.
    """

    one_run: PrivacyLoss = attrs.field(kw_only=True)
    mean: float = attrs.field(kw_only=True)
    shift: float = attrs.field(kw_only=True)

    def epsilon(self, delta: float) -> float:
        """Returns an epsilon that holds at `delta`."""
        return self.one_run.epsilon(_validate.open_unit("delta", delta) / self.mean) + self.shift

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        """Returns a delta that holds at each epsilon of a vector."""
        if self.directions is None:
            return np.ones(len(epsilons))
        beyond = self.mean * self.one_run.deltas(np.maximum(epsilons - self.shift, 0.0))
        # Delta is convex in e^epsilon, and 1 where that is 0: below the shift a chord is a bound.
        share = np.exp(np.minimum(epsilons - self.shift, 0.0))
        return np.clip(1 - share * (1 - beyond), 0.0, 1.0)


def tuned(
    event: dp_accounting.DpEvent | Sequence[dp_accounting.DpEvent],
    runs: RandomRuns,
    *,
    delta: float,
    relation: Relation | None = None,
) -> float:
    """Returns the epsilon of a search that returns the best of a random number of runs.

    The search draws the number of runs. For each run it draws one of the candidate settings, with
    probabilities that were fixed before, and trains with it. It returns the run with the best
    score, and nothing else. For this to hold:

    - The number of runs is drawn by `runs.draw(key)` and stays secret. So do all other runs, their
      scores, and the time that the search took.
    - A score is computed from what the run released, and from data that the guarantee does not
      protect. If it reads protected data, such as the people of a validation set, it must be noisy
      too: pass `dp_accounting.ComposedDpEvent([plan.event(), event_of_the_score])`.

    Args:
        event: what one run costs, such as `plan.event()` or `ledger.event()`; or the events of all
            candidates, if they differ.
        runs: the distribution of the number of runs.
        delta: of the search; strictly between 0 and 1.
        relation: which data sets are neighbours; None for add_or_remove_one. Pass
            `plan.sampler.relation` for the event of a plan.

    Returns:
        Epsilon, an upper bound.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: delta is out of range.
        dp_accounting.UnsupportedEventError: no privacy loss distribution is known of the event.

    Example:
        >>> import dp_accounting
        >>> one_run = dp_accounting.GaussianDpEvent(3.0)
        >>> round(tuned(one_run, RandomRuns(mean=1), delta=1e-5), 3)
        1.271
        >>> round(tuned(one_run, RandomRuns(mean=10), delta=1e-5), 3)
        2.494

    Reference: Liu and Talwar 2019, arXiv:1811.07971; Papernot and Steinke 2022, arXiv:2110.03620;
    Koskela, Redberg and Wang 2024, arXiv:2402.06701.
    """
    loss = search_loss(event, runs, delta=delta, relation=relation)
    return min(loss.epsilon(delta), renyi_epsilon(event, runs, delta, relation))


def search_loss(
    event: dp_accounting.DpEvent | Sequence[dp_accounting.DpEvent],
    runs: RandomRuns,
    *,
    delta: float,
    relation: Relation | None = None,
) -> SearchLoss:
    """Returns the privacy loss of a search over runs that cost `event`; see `tuned`."""
    delta = _validate.open_unit("delta", delta)
    check_runs(runs)
    parsed = resolve_relation(relation, "add_or_remove_one")
    losses = [
        event_privacy_loss(one, delta=delta / runs.mean, relation=parsed)
        for one in _candidates(event)
    ]
    return of_runs(_worst(losses), runs, delta)


def check_runs(runs: Any) -> None:
    """Raises for anything but a distribution of the number of runs."""
    if not isinstance(runs, RandomRuns):
        raise TypeError(
            f"runs must be a dpoptax.accounting.RandomRuns; got {_validate.described(runs)}. Pass "
            "RandomRuns(mean=10). A fixed number of runs has no such bound."
        )


def of_runs(one_run: PrivacyLoss, runs: RandomRuns, delta: float) -> SearchLoss:
    """Returns the loss of a search, from that of one run; best at this `delta`."""
    largest = one_run.epsilon(delta / runs.mean)
    if math.isinf(largest):
        directions, shift = None, math.inf
    else:
        directions = one_run.directions
        trials = np.linspace(0.0, largest, NUM_TRIALS)
        shift = float(np.min(_shifts(runs, trials, one_run.deltas(trials))))
    return SearchLoss(
        directions,
        runs.mean * one_run.overflow,
        one_run=one_run,
        mean=runs.mean,
        shift=shift,
    )


def _shifts(runs: RandomRuns, trials: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """The shift at each e1, as the module's docstring defines it."""
    if math.isinf(runs.shape):
        return runs.mean * (np.expm1(np.minimum(trials, 700.0)) + deltas)
    odds = 1 / runs.halting_probability - 1
    if odds == 0:
        return trials * 0.0
    with np.errstate(divide="ignore"):
        return (1 + runs.shape) * np.logaddexp(trials, math.log(odds) + np.log(deltas))


def _candidates(event: object) -> list[dp_accounting.DpEvent]:
    events = list(event) if isinstance(event, Sequence) else [event]
    for one in events or [None]:
        if not isinstance(one, dp_accounting.DpEvent):
            raise TypeError(
                f"expected the event of a run, or several; got {_validate.described(one)}. Pass "
                "for example plan.event()."
            )
    return events


def _worst(losses: list[PrivacyLoss]) -> PrivacyLoss:
    """The loss of a run that may have any of these losses."""
    # A candidate is drawn independently of the data, so the largest delta of all is a bound.
    if any(loss.directions is None for loss in losses):
        return PrivacyLoss(None)
    directions = tuple(one for loss in losses for one in loss.directions or ())
    return PrivacyLoss(directions, max(loss.overflow for loss in losses))


def renyi_epsilon(
    event: dp_accounting.DpEvent | Sequence[dp_accounting.DpEvent],
    runs: RandomRuns,
    delta: float,
    relation: Relation | None,
) -> float:
    """Epsilon by theorem 6 of Papernot and Steinke; inf where it does not help or is not known."""
    parsed = resolve_relation(relation, "add_or_remove_one")
    events = _candidates(event)
    # dp-accounting's Rényi accountant understates the cost of sums under replace_one.
    if (
        math.isfinite(runs.shape)
        or len(events) > 1
        or parsed == NeighboringRelation.REPLACE_ONE
        or runs.mean == 1
    ):
        return math.inf
    steps, overflow = renyi_steps(events[0], delta / runs.mean, ORDERS)
    accountant = RdpAccountant(list(ORDERS), parsed)
    search = runs.event(dp_accounting.ComposedDpEvent(steps))
    if not accountant.supports(search):
        return math.inf
    accountant.compose(search)
    # An overflow in any run is paid from delta. There are `mean` runs on average.
    return float(accountant.get_epsilon(delta - runs.mean * overflow))
