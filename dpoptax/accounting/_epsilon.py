"""Epsilon and delta of a run, from its sampler, noise multiplier and number of steps.

The accountant composes privacy loss distributions (PLDs) on a grid. The result is an upper bound,
tight up to the grid. The noise multiplier is always the standard deviation of the noise on the sum,
divided by the clip bound.
"""

import math

import attrs
import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation

from dpoptax import _validate
from dpoptax._foreign_names import answer_foreign_names
from dpoptax.accounting._compose import Composition, compositions
from dpoptax.accounting._correlated import correlated_event, strategy_of
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.accounting._normalize_event import (
    NormalizedSteps,
    holds_for_groups,
    normalize,
    normalize_for_group,
)
from dpoptax.accounting._step_pld import grid_step, step_distribution
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers import Sampler
from dpoptax.schedules import ScalarOrSchedule, as_schedule, validated

# exp(500) is still finite. Where losses need a coarser grid than that, no guarantee is given.
LARGEST_GRID_STEP = 500.0


@attrs.frozen
class PrivacyLoss:
    """The privacy loss of a whole run, from which every guarantee can be read.

    `Plan.privacy_loss` makes it.

    Attributes:
        directions: the distribution of the loss on a grid, rounded up; one per direction of
            neighbours (an example more, an example less). None for a run without noise, or with
            almost none.
        overflow: a probability that is added to every delta; see `dpoptax.samplers.Poisson`.

    Example:
        >>> import dp_accounting
        >>> loss = event_privacy_loss(dp_accounting.GaussianDpEvent(1.0), delta=1e-5)
        >>> round(loss.epsilon(1e-5), 2), round(loss.delta(1.0), 4)
        (4.38, 0.1269)
    """

    directions: tuple[Composition, ...] | None
    overflow: float = 0.0

    def epsilon(self, delta: float) -> float:
        """Returns the smallest epsilon at `delta`; inf where there is none."""
        delta = _validate.open_unit("delta", delta)
        if self.directions is None or delta <= self.overflow:
            return math.inf
        return max((one.epsilon(delta - self.overflow) for one in self.directions), default=0.0)

    def delta(self, epsilon: float) -> float:
        """Returns the smallest delta at `epsilon`, which must be zero or more."""
        return float(self.deltas(np.array([_validate.non_negative("epsilon", epsilon)]))[0])

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        """Returns the smallest delta at each epsilon of a vector, rounded up by about 1e-13."""
        if self.directions is None:
            return np.ones(len(epsilons))
        # A guarantee must hold in both directions, so that the larger delta counts.
        deltas = [np.zeros(len(epsilons)), *(one.deltas(epsilons) for one in self.directions)]
        return np.clip(np.max(deltas, axis=0) + self.overflow, 0.0, 1.0)


@answer_foreign_names
def epsilon(
    *,
    sampler: Sampler,
    noise_multiplier: ScalarOrSchedule,
    num_steps: int | None = None,
    epochs: float | None = None,
    delta: float,
    relation: Relation | None = None,
    group_size: int = 1,
    mechanism: AnyMechanism = Gaussian(),
) -> float:
    """Returns the epsilon of `num_steps` noisy sums over batches of `sampler`.

    Args:
        sampler: the sampler that ran.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound; a
            number, or a `dpoptax.schedules.Schedule`. Zero costs `math.inf`.
        num_steps: how many sums were released, where zero costs nothing; or
        epochs: how often each example took part on average. Give one of the two.
        delta: strictly between 0 and 1, and well below 1 / num_examples.
        relation: which data sets are neighbours, see `dpoptax.relations`; None for the sampler's
            own relation, which is `replace_special` for `Shuffled` and `CyclicPoisson`.
        group_size: how many examples neighbours differ in.
        mechanism: how the noise was drawn. `mechanisms.Correlated` changes epsilon, and needs a
            sampler that it is proven for.

    Returns:
        Epsilon, an upper bound.

    Raises:
        TypeError: a count is not whole, or a number is not real; or both or none of num_steps and
            epochs are given.
        ValueError: a number is out of range, or the relation is unknown; or nothing is proven about
            correlated noise under this sampler.

    Warns:
        UserWarning: delta is above 1 / num_examples.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> sampler = Poisson(num_examples=60_000, expected_batch_size=128)
        >>> run = dict(sampler=sampler, noise_multiplier=1.1, num_steps=9380, delta=1e-5)
        >>> round(epsilon(**run), 3), round(epsilon(**run, group_size=3), 2)
        (0.89, 3.02)

    Reference: Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380.
    """
    noise_multiplier = validated("noise_multiplier", noise_multiplier, _validate.non_negative)
    delta = _validate.open_unit("delta", delta)
    _validate.warn_of_large_delta(delta, sampler.num_examples, sampler.unit)
    relation = resolve_relation(relation, sampler.relation)
    num_steps = num_steps_of(sampler, epochs, num_steps, at_least=0)
    event = run_event(sampler, noise_multiplier, num_steps, relation, mechanism)
    return event_epsilon(event, delta=delta, relation=relation, group_size=group_size)


def resolve_relation(relation: Relation | None, default: Relation) -> NeighboringRelation:
    """Returns dp-accounting's enum value for `relation`, or for the default if it is None."""
    return parse_relation(default if relation is None else relation)


def run_event(
    sampler: Sampler,
    noise_multiplier: ScalarOrSchedule,
    num_steps: int,
    relation: Relation | None = None,
    mechanism: AnyMechanism = Gaussian(),
) -> dp_accounting.DpEvent:
    """Returns the event of a run, also of one without steps or without noise."""
    num_steps = _validate.count("num_steps", num_steps, at_least=0)
    relation = resolve_relation(relation, sampler.relation)
    strategy = strategy_of(mechanism)
    if strategy is not None:
        return correlated_event(strategy, sampler, noise_multiplier, num_steps, relation)
    if num_steps == 0:
        return dp_accounting.NoOpDpEvent()
    # Only the steps that ran count: a schedule may end without noise after them.
    if as_schedule(noise_multiplier).slice(0, num_steps).min == 0:
        return dp_accounting.NonPrivateDpEvent()
    return sampler.event(noise_multiplier, num_steps, relation)


def event_epsilon(
    event: dp_accounting.DpEvent,
    *,
    delta: float,
    relation: Relation | None = None,
    group_size: int = 1,
) -> float:
    """Returns the epsilon of a dp-accounting event.

    Args:
        event: Gaussian noise, also subsampled; mixtures of Gaussians; Laplace noise; and
            compositions of these. Noise multipliers are relative to the clip bound, never to the
            sensitivity, also inside a `SampledWithoutReplacementDpEvent`.
        delta: strictly between 0 and 1.
        relation: which data sets are neighbours; None for add_or_remove_one. An event does not know
            its sampler: for the event of a plan, pass the relation it was made for.
        group_size: how many examples neighbours differ in.

    Returns:
        Epsilon, an upper bound.

    Raises:
        ValueError: delta is out of range, or the relation is unknown.
        dp_accounting.UnsupportedEventError: no privacy loss distribution is known of the event.

    Example:
        >>> import dp_accounting
        >>> round(event_epsilon(dp_accounting.GaussianDpEvent(1.0), delta=1e-5), 2)
        4.38
    """
    return coarse_epsilon(
        event, delta=delta, relation=relation, group_size=group_size, coarsening=1.0
    )


def coarse_epsilon(
    event: dp_accounting.DpEvent,
    *,
    delta: float,
    relation: Relation | None = None,
    group_size: int = 1,
    coarsening: float,
) -> float:
    """`event_epsilon` on a coarser grid: about `coarsening` times faster, looser, still a bound."""
    delta = _validate.open_unit("delta", delta)
    parsed = resolve_relation(relation, "add_or_remove_one")
    group_size = _validate.count("group_size", group_size)
    if group_size == 1:
        return _privacy_loss(normalize(event, delta=delta), parsed, coarsening).epsilon(delta)
    # Where the event of a group is known, it is much tighter than the general bound.
    steps = normalize_for_group(event, delta=delta, relation=parsed, group_size=group_size)
    known = math.inf
    if steps is not None:
        known = _privacy_loss(steps, parsed, coarsening).epsilon(delta)
        if holds_for_groups(event):
            return known
    # Nothing, or little, is known of the group's own event: use what follows for every mechanism.
    single = _privacy_loss(normalize(event, delta=delta), parsed, coarsening)
    return min(known, general_group_epsilon(single, group_size, delta))


def event_privacy_loss(
    event: dp_accounting.DpEvent,
    *,
    delta: float,
    relation: Relation | None = None,
    coarsening: float = 1.0,
) -> PrivacyLoss:
    """Returns the privacy loss of a dp-accounting event, to read many guarantees off.

    Args:
        event: as in `event_epsilon`.
        delta: the smallest delta that it will be asked at. Up to a twentieth of it may pay for
            batches that overflow.
        relation: which data sets are neighbours; None for add_or_remove_one.
        coarsening: how much coarser the grid is than usual, as in `coarse_epsilon`.

    Returns:
        A `PrivacyLoss`.

    Raises:
        ValueError: delta is out of range, or the relation is unknown.
        dp_accounting.UnsupportedEventError: no privacy loss distribution is known of the event.

    Example:
        >>> import dp_accounting
        >>> loss = event_privacy_loss(dp_accounting.GaussianDpEvent(2.0), delta=1e-6)
        >>> loss.epsilon(1e-5) < loss.epsilon(1e-6)
        True
    """
    steps = normalize(event, delta=_validate.open_unit("delta", delta))
    parsed = resolve_relation(relation, "add_or_remove_one")
    return _privacy_loss(steps, parsed, coarsening)


def _privacy_loss(
    steps: NormalizedSteps, relation: NeighboringRelation, coarsening: float
) -> PrivacyLoss:
    if not steps.has_noise:
        return PrivacyLoss(None)
    if not steps.counts:
        return PrivacyLoss(())
    # All steps share one grid, or they could not be convolved.
    usual = grid_step(steps.counts)
    if usual > LARGEST_GRID_STEP:
        return PrivacyLoss(None)
    step = min(coarsening * usual, LARGEST_GRID_STEP)
    runs = [
        (step_distribution(event, relation, step), count) for event, count in steps.counts.items()
    ]
    return PrivacyLoss(tuple(compositions(runs, step)), steps.overflow)


def general_group_epsilon(loss: PrivacyLoss, group_size: int, delta: float) -> float:
    """What the guarantee of one example implies for a group, whatever the mechanism.

    (epsilon, d) for one implies (k epsilon, d (e^(k epsilon) - 1) / (e^epsilon - 1)) for k (Dwork
    and Roth 2014, theorem 2.2, in the form of Vadhan 2017, lemma 2.2).
    """
    # log((e^(k epsilon) - 1) / (e^epsilon - 1)), without overflow. Any feasible grid point is
    # a valid answer; its spacing costs tightness only.
    epsilons = np.geomspace(1e-4, 1e3 / group_size, 4000)
    log_factor = group_size * epsilons + np.log1p(-np.exp(-group_size * epsilons))
    log_factor -= epsilons + np.log1p(-np.exp(-epsilons))
    with np.errstate(divide="ignore"):
        feasible = np.log(loss.deltas(epsilons)) + log_factor <= math.log(delta)
    if not feasible.any():
        return math.inf
    return group_size * float(epsilons[np.argmax(feasible)])
