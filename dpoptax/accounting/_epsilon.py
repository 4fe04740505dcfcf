"""A sampler, a noise multiplier and a number of steps in; what they cost out.

The mathematics is dp-accounting's privacy loss distribution (PLD), an upper bound that is tight
up to its grid. This folder owns what surrounds it: which event a sampler means, which relation,
and how fine the grid must be. The convention everywhere is that of the noise multiplier: standard
deviation of the noise on the sum, divided by the clip bound.
"""

import dataclasses
import math

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation

from dpoptax import _validate
from dpoptax.accounting._compose import Composition, compositions
from dpoptax.accounting._normalize_event import Pieces, pieces
from dpoptax.accounting._step_pld import grid_step, one_step
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers import Sampler
from dpoptax.schedules import Scheduled, checked, extremes, slice_of

# Its exponential is finite. Losses that need a coarser one are taken for infinite.
LARGEST_GRID_STEP = 500.0


@dataclasses.dataclass(frozen=True)
class PrivacyLoss:
    """The privacy loss of a whole run, of which every guarantee is a reading.

    Made by `event_privacy_loss` and `Plan.privacy_loss`.

    Attributes:
        directions: its distribution for each direction of neighbours (one example more, one less),
            on a grid and rounded up; None for a run without noise, or with next to none.
        overflow: a probability added to every delta; see `dpoptax.samplers.Poisson`.

    Example:
        >>> import dp_accounting
        >>> loss = event_privacy_loss(dp_accounting.GaussianDpEvent(1.0), delta=1e-5)
        >>> round(loss.epsilon(1e-5), 2), round(loss.delta(1.0), 4)
        (4.38, 0.1269)
    """

    directions: tuple[Composition, ...] | None
    overflow: float = 0.0

    def epsilon(self, delta: float) -> float:
        """Returns the least epsilon at `delta`; inf where there is none."""
        delta = _validate.open_unit("delta", delta)
        if self.directions is None or delta <= self.overflow:
            return math.inf
        return max((one.epsilon(delta - self.overflow) for one in self.directions), default=0.0)

    def delta(self, epsilon: float) -> float:
        """Returns the least delta at `epsilon`, zero or more."""
        return float(self.deltas(np.array([_validate.non_negative("epsilon", epsilon)]))[0])

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        """Returns the least delta at each of a vector of epsilons, to an absolute 1e-13 or so."""
        if self.directions is None:
            return np.ones(len(epsilons))
        deltas = [np.zeros(len(epsilons)), *(one.deltas(epsilons) for one in self.directions)]
        return np.clip(np.max(deltas, axis=0) + self.overflow, 0.0, 1.0)


def epsilon(
    *,
    sampler: Sampler,
    noise_multiplier: Scheduled,
    num_steps: int,
    delta: float,
    relation: Relation = "add_or_remove_one",
    group_size: int = 1,
) -> float:
    """Returns the epsilon that `num_steps` noisy sums over batches of `sampler` cost at `delta`.

    Args:
        sampler: the sampler that ran; its law is the one accounted.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound;
            a number, or a `dpoptax.schedules.Schedule`. Zero costs `math.inf`.
        num_steps: how many releases there were. Zero costs nothing.
        delta: strictly between 0 and 1, well below 1 / num_examples.
        relation: which data sets count as neighbours; see `dpoptax.relations`.
        group_size: how many examples neighbours differ in, where that is more than one.

    Returns:
        Epsilon, an upper bound.

    Raises:
        TypeError: a count that is not whole, a number that is not real.
        ValueError: a number out of range, an unknown relation.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> sampler = Poisson(num_examples=60_000, expected_batch_size=128)
        >>> run = dict(sampler=sampler, noise_multiplier=1.1, num_steps=9380, delta=1e-5)
        >>> round(epsilon(**run), 3), round(epsilon(**run, group_size=3), 2)
        (0.89, 3.02)

    Reference: Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380.
    """
    noise_multiplier = checked("noise_multiplier", noise_multiplier, _validate.non_negative)
    event = run_event(sampler, noise_multiplier, num_steps, relation)
    return event_epsilon(event, delta=delta, relation=relation, group_size=group_size)


def run_event(
    sampler: Sampler, noise_multiplier: Scheduled, num_steps: int, relation: Relation
) -> dp_accounting.DpEvent:
    """Returns the event of a run, also of one without steps or without noise.

    Args:
        sampler: who takes part in each step.
        noise_multiplier: a number or a `Schedule`.
        num_steps: zero or more.
        relation: which data sets count as neighbours.

    Returns:
        dp-accounting's event.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> run_event(Poisson(100, 10), 0.0, 5, "add_or_remove_one")
        NonPrivateDpEvent()
    """
    num_steps = _validate.count("num_steps", num_steps, at_least=0)
    parsed = parse_relation(relation)
    if num_steps == 0:
        return dp_accounting.NoOpDpEvent()
    least, _ = extremes(slice_of(noise_multiplier, 0, num_steps))
    if least == 0:
        return dp_accounting.NonPrivateDpEvent()
    return sampler.event(noise_multiplier, num_steps, parsed)


def event_epsilon(
    event: dp_accounting.DpEvent,
    *,
    delta: float,
    relation: Relation = "add_or_remove_one",
    group_size: int = 1,
    coarsening: float = 1.0,
) -> float:
    """Returns the epsilon of any dp-accounting event whose privacy loss has a distribution.

    Args:
        event: Gaussians, as they are or sampled, mixtures of them, Laplace noise, and compositions
            of these. Noise multipliers in it are relative to the clip bound, never to the
            sensitivity, also in a `SampledWithoutReplacementDpEvent`.
        delta: strictly between 0 and 1.
        relation: which data sets count as neighbours; of a plan's event, its sampler's.
        group_size: how many examples neighbours differ in.
        coarsening: how many times coarser than usual the grid may be. Coarser is faster, looser,
            and still an upper bound.

    Returns:
        Epsilon, an upper bound.

    Raises:
        ValueError: delta out of range, an unknown relation.
        dp_accounting.UnsupportedEventError: an event without a privacy loss distribution.

    Example:
        >>> import dp_accounting
        >>> round(event_epsilon(dp_accounting.GaussianDpEvent(1.0), delta=1e-5), 2)
        4.38
    """
    delta = _validate.open_unit("delta", delta)
    parsed = parse_relation(relation)
    group_size = _validate.count("group_size", group_size)
    found = pieces(event, delta=delta, relation=parsed, group_size=group_size)
    if found is not None:
        return _privacy_loss(found, parsed, coarsening).epsilon(delta)
    single = event_privacy_loss(event, delta=delta, relation=parsed, coarsening=coarsening)
    return _of_group(single, group_size, delta)


def event_privacy_loss(
    event: dp_accounting.DpEvent,
    *,
    delta: float,
    relation: Relation = "add_or_remove_one",
    coarsening: float = 1.0,
) -> PrivacyLoss:
    """Returns the privacy loss of any dp-accounting event, for further questions.

    Args:
        event: as in `event_epsilon`.
        delta: the least at which it will be asked; of it, a twentieth may pay for batches that
            overflow.
        relation: which data sets count as neighbours.
        coarsening: as in `event_epsilon`.

    Returns:
        A `PrivacyLoss`.

    Raises:
        ValueError: delta out of range, an unknown relation.
        dp_accounting.UnsupportedEventError: an event without a privacy loss distribution.

    Example:
        >>> import dp_accounting
        >>> loss = event_privacy_loss(dp_accounting.GaussianDpEvent(2.0), delta=1e-6)
        >>> loss.epsilon(1e-5) < loss.epsilon(1e-6)
        True
    """
    parsed = parse_relation(relation)
    found = pieces(event, delta=_validate.open_unit("delta", delta), relation=parsed)
    assert found is not None  # only groups can be unknown
    return _privacy_loss(found, parsed, coarsening)


def _privacy_loss(found: Pieces, relation: NeighboringRelation, coarsening: float) -> PrivacyLoss:
    if not found.private:
        return PrivacyLoss(None)
    if not found.counts:
        return PrivacyLoss(())
    usual = grid_step(found.counts)
    if usual > LARGEST_GRID_STEP:
        return PrivacyLoss(None)
    step = min(coarsening * usual, LARGEST_GRID_STEP)
    runs = [(one_step(event, relation, step), count) for event, count in found.counts.items()]
    return PrivacyLoss(tuple(compositions(runs, step)), found.overflow)


def _of_group(loss: PrivacyLoss, group_size: int, delta: float) -> float:
    """What follows for a group from the guarantee of one example, whatever the mechanism.

    (epsilon, d) for one is (k epsilon, d (e^(k epsilon) - 1) / (e^epsilon - 1)) for k (Dwork and
    Roth 2014, theorem 2.2, in the form of Vadhan 2017, lemma 2.2).
    """
    epsilons = np.geomspace(1e-4, 1e3 / group_size, 4000)
    log_factor = group_size * epsilons + np.log1p(-np.exp(-group_size * epsilons))
    log_factor -= epsilons + np.log1p(-np.exp(-epsilons))
    with np.errstate(divide="ignore"):
        feasible = np.log(loss.deltas(epsilons)) + log_factor <= math.log(delta)
    if not feasible.any():
        return math.inf
    return group_size * float(epsilons[np.argmax(feasible)])
