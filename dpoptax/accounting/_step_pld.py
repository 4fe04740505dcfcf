"""Privacy loss distribution (PLD) of a single step, and the grid that it is put on."""

import functools
import math
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent, TruncatedSubsampledGaussianDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld

from dpoptax._dp_events import (
    KnownBranchDpEvent,
    LimitedPoissonDpEvent,
    RandomAllocationDpEvent,
    TruncatedRandomAllocationDpEvent,
)
from dpoptax.accounting import _random_allocation as allocation
from dpoptax.accounting import _subsampled_gaussian as subsampled
from dpoptax.accounting._dp_accounting_compat import GridLoss, distribution, grid_losses
from dpoptax.accounting._mixture_of_gaussians import mixture_of_gaussians

# Grid steps, in units of epsilon. A finer grid is tighter, and slower. USUAL is dp-accounting's
# default.
FINEST, USUAL, COARSEST = 1e-7, 1e-4, 1e-3
# The most grid points of one step. Time grows with it; here one step takes a fraction of a second.
MAX_POINTS = 125_000
# How many times the variance of the loss exceeds what rounding adds to it: 20 overstates epsilon by
# about 0.1 %. A schedule of more than MANY_KINDS kinds of steps would take long, and gets 8.
VARIANCE_RATIO, MANY_KINDS, VARIANCE_RATIO_OF_MANY = 20, 10, 8
# Limits the weight of large moves in the choice of the grid.
LARGEST_EXPONENT = 8.0
# How many times more points a step with truncation may have: it mixes two distributions of
# different scale, and the grid must resolve the smaller one.
TRUNCATED_POINTS = 4


def grid_step(counts: dict[dp_accounting.DpEvent, int]) -> float:
    """Returns a grid step at which a run costs at most about 0.1 % too much.

    Rounding a loss L to a grid of step h, with its mean kept, adds up to h E|L| to its variance.
    The step is chosen such that this is a twentieth of the variance where a step of the run costs
    little, and far less elsewhere. dp-accounting's default of 1e-4 overstates epsilon several times
    where a step costs less than that, and takes seconds where it costs much.

    A too fine grid has rounding errors: the probabilities of dp-accounting's distributions sum to
    about 1 + 1e-18 / h^2, and many steps raise this to a power.
    """
    variance = size = 0.0
    coarsest = COARSEST
    finest = max(FINEST, 1e-9 * math.sqrt(sum(counts.values())))
    for step, count in counts.items():
        found = _spread(step)
        if found is None:
            return USUAL
        spread, joins, largest_move = found
        variance += count * spread**2
        size += count * min(spread, 2 * joins)  # E|L|, or its bound where losses are rare
        coarsest = max(coarsest, USUAL * largest_move**2)
        finest = max(finest, _longest_loss(step) / MAX_POINTS)
    if not size:
        return USUAL
    ratio = VARIANCE_RATIO if len(counts) <= MANY_KINDS else VARIANCE_RATIO_OF_MANY
    return max(min(variance / size / ratio, coarsest), finest)


@functools.lru_cache(maxsize=16)
def step_distribution(
    step: dp_accounting.DpEvent, relation: NeighboringRelation, grid_step: float
) -> pld.PrivacyLossDistribution:
    """Returns the privacy loss of a one-step event, an upper bound.

    Raises:
        dp_accounting.UnsupportedEventError: none is known of such a step under that relation.
    """
    replaces = relation == NeighboringRelation.REPLACE_ONE
    adds = relation == NeighboringRelation.ADD_OR_REMOVE_ONE
    grid = {"value_discretization_interval": grid_step}
    match step:
        case dp_accounting.GaussianDpEvent(noise_multiplier=noise):
            return pld.from_gaussian_mechanism(noise, neighboring_relation=relation, **grid)
        case dp_accounting.PoissonSampledDpEvent(
            sampling_probability=rate, event=dp_accounting.GaussianDpEvent(noise_multiplier=noise)
        ):
            # Our closed forms are faster, but not for all cases.
            if replaces:
                return subsampled.poisson_replacing(rate, noise, grid_step)
            if rate <= 0.5:
                return subsampled.poisson(rate, noise, grid_step)
            return pld.from_gaussian_mechanism(
                noise, sampling_prob=rate, neighboring_relation=relation, **grid
            )
        case LimitedPoissonDpEvent(event=unlimited):
            loss = step_distribution(unlimited, relation, grid_step)
            return subsampled.of_limited_batch(step, loss, grid_step) if adds else loss
        case TruncatedSubsampledGaussianDpEvent():
            return _truncated_poisson(step, relation, grid_step)
        case dp_accounting.SampledWithoutReplacementDpEvent(
            source_dataset_size=size,
            sample_size=sample,
            event=dp_accounting.GaussianDpEvent(noise_multiplier=noise),
        ):
            if adds:
                # One example more pushes another out of the full batch, so that the sum moves by
                # twice the clip bound: a Poisson batch with half the noise.
                gaussian = dp_accounting.GaussianDpEvent(noise / 2)
                poisson = dp_accounting.PoissonSampledDpEvent(sample / size, gaussian)
                return step_distribution(poisson, relation, grid_step)
            return subsampled.without_replacement(sample / size, noise, grid_step)
        case KnownBranchDpEvent(rare=dp_accounting.NonPrivateDpEvent()):
            return _with_failure(step, relation, grid_step)
        case KnownBranchDpEvent(usual=usual, rare=rare, probability=probability):
            # The branch is public, so that the losses are mixed, not the outputs.
            return step_distribution(rare, relation, grid_step).compute_mixture(
                step_distribution(usual, relation, grid_step), probability
            )
        case TruncatedRandomAllocationDpEvent() if not replaces:
            return allocation.truncated_random_allocation(step, grid_step)
    allocated = _allocation(step)
    if allocated is not None and not isinstance(step, TruncatedRandomAllocationDpEvent):
        by_relation = (
            allocation.random_allocation_replacing if replaces else allocation.random_allocation
        )
        return by_relation(*allocated, grid_step)
    found = _other_distribution(step, relation, grid_step)
    if found is not None:
        return found
    raise dp_accounting.UnsupportedEventError(
        f"no privacy loss distribution is known of {type(step).__name__} under "
        f"{relation.name.lower()}. Account this release by other means. Another relation is "
        "another guarantee."
    )


def _truncated_poisson(
    event: TruncatedSubsampledGaussianDpEvent, relation: NeighboringRelation, grid_step: float
) -> pld.PrivacyLossDistribution:
    """The loss of one noisy sum over a Poisson batch that is cut to a largest size.

    Where the other examples fill the batch, the example takes the place of another one. Fix who is
    in the batch without the example. With it, the example then replaces a random one of them with
    a probability that does not depend on who they are, and the sum moves by at most two clip
    bounds. By joint convexity, this is a Poisson batch of half the noise. Under the other relations
    both neighbours move away from that batch (arXiv:2508.15089).
    """
    import scipy.stats  # slow to import

    size, rate = event.dataset_size, event.sampling_probability
    largest, noise = event.truncated_batch_size, event.noise_multiplier

    def poisson(
        rate: float, noise: float, relation: NeighboringRelation
    ) -> pld.PrivacyLossDistribution:
        sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        return step_distribution(sampled, relation, grid_step)

    unlimited = poisson(rate, noise, relation)
    full = float(scipy.stats.binom.sf(largest - 1, size - 1, rate))
    if full == 0:
        return unlimited
    # The probability that the example is in the batch, if the others fill it.
    joins = min(float(scipy.stats.binom.sf(largest, size, rate)) * largest / full / size, 1.0)
    adds = relation == NeighboringRelation.ADD_OR_REMOVE_ONE
    moved = poisson(joins, noise / 2, relation if adds else NeighboringRelation.REPLACE_ONE)
    return moved.compute_mixture(unlimited, full)


def _with_failure(
    step: KnownBranchDpEvent, relation: NeighboringRelation, grid_step: float
) -> pld.PrivacyLossDistribution:
    """The loss of a step that protects nothing with a small probability: it is then infinite."""
    stays = 1 - step.probability
    usual = (
        pld.identity(value_discretization_interval=grid_step)
        if isinstance(step.usual, dp_accounting.NoOpDpEvent)
        else step_distribution(step.usual, relation, grid_step)
    )
    losses = [
        GridLoss(stays * loss.probabilities, loss.lowest, stays * loss.infinite + step.probability)
        for loss in grid_losses(usual)
    ]
    return distribution(grid_step, *losses)


def _other_distribution(
    step: dp_accounting.DpEvent, relation: NeighboringRelation, grid_step: float
) -> pld.PrivacyLossDistribution | None:
    """The loss of steps that no sampler of ours makes, but that a ledger may be charged."""
    grid = {"value_discretization_interval": grid_step}
    # dp-accounting's distributions of these hold under some relations only.
    replaces = relation == NeighboringRelation.REPLACE_ONE
    adds = relation == NeighboringRelation.ADD_OR_REMOVE_ONE
    match step:
        case MixtureOfGaussiansDpEvent() if not replaces and min(step.sensitivities) >= 0:
            return mixture_of_gaussians(step, grid_step)
        case dp_accounting.LaplaceDpEvent(noise_multiplier=noise) if not replaces:
            return pld.from_laplace_mechanism(noise, **grid)
        case dp_accounting.PoissonSampledDpEvent(
            sampling_probability=rate, event=dp_accounting.LaplaceDpEvent(noise_multiplier=noise)
        ) if not replaces:
            return pld.from_laplace_mechanism(noise, sampling_prob=rate, **grid)
        case dp_accounting.dp_event.DiscreteLaplaceDpEvent(
            noise_parameter=noise, sensitivity=sensitivity
        ) if not replaces:
            return pld.from_discrete_laplace_mechanism(noise, sensitivity=sensitivity, **grid)
        case dp_accounting.dp_event.RandomizedResponseDpEvent(
            noise_parameter=noise, num_buckets=buckets
        ) if not adds:
            return pld.from_randomized_response(
                noise, buckets, neighboring_relation=relation, **grid
            )
    return None


def _spread(step: dp_accounting.DpEvent) -> tuple[float, float, float] | None:
    """The deviation of the loss, the probability that an example joins, and its largest move."""
    allocated = _allocation(step)
    if allocated is not None:
        steps, noise = allocated
        return math.sqrt(allocation.chi_squared(steps, noise)), 1.0, 1 / noise
    shifts = _shift_distribution(step)
    if shifts is None:
        return None
    probabilities, moves = shifts
    # The chi-squared divergence between neighbours, which is about the variance of the loss where
    # moves are small. It grows much faster where a rare move is large.
    exponents = np.minimum(np.outer(moves, moves), LARGEST_EXPONENT)
    spread = math.sqrt(probabilities @ np.expm1(exponents) @ probabilities)
    return spread, float(probabilities[moves > 0].sum()), float(moves.max())


def _allocation(step: Any) -> tuple[int, float] | None:
    """The number of steps of a random allocation and its noise multiplier, or None."""
    if isinstance(step, KnownBranchDpEvent):
        return _allocation(step.usual)
    if isinstance(step, TruncatedRandomAllocationDpEvent):
        return step.num_steps, step.noise_multiplier
    if isinstance(step, RandomAllocationDpEvent) and isinstance(
        step.event, dp_accounting.GaussianDpEvent
    ):
        return step.num_steps, step.event.noise_multiplier
    return None


def _longest_loss(step: dp_accounting.DpEvent) -> float:
    """Roughly the largest loss on the grid; inf where it is not known."""
    if isinstance(step, LimitedPoissonDpEvent):
        # With very much noise, the loss of a full batch is far beyond all others.
        return max(_longest_loss(step.event), step.loss_if_crowded())
    if isinstance(step, TruncatedSubsampledGaussianDpEvent):
        # The loss where the new example pushes another one out of the batch. This is rare, so that
        # fewer points do little harm.
        move = 4 / step.noise_multiplier
        return (move**2 / 2 + 10 * move) / TRUNCATED_POINTS
    allocated = _allocation(step)
    if allocated is not None:
        return allocation.largest_loss(*allocated)
    shifts = _shift_distribution(step)
    if shifts is None:
        return math.inf
    probabilities, moves = shifts
    joins, largest = float(probabilities[moves > 0].sum()), float(moves.max())
    # Ten standard deviations beyond the mean loss of an example that takes part.
    exponent = largest**2 / 2 + 10 * largest
    # log(1 + joins (exp(exponent) - 1)), where the exponential may overflow.
    return (
        math.log(joins) + exponent if exponent > 700 else math.log1p(joins * math.expm1(exponent))
    )


def _shift_distribution(step: dp_accounting.DpEvent) -> tuple[np.ndarray, np.ndarray] | None:
    """The probabilities with which an example moves the sum, and how far, in units of the noise."""
    match step:
        case dp_accounting.GaussianDpEvent(noise_multiplier=noise):
            return np.ones(1), np.array([1 / noise])
        case LimitedPoissonDpEvent(event=unlimited):
            return _shift_distribution(unlimited)
        case dp_accounting.PoissonSampledDpEvent(
            sampling_probability=rate, event=dp_accounting.GaussianDpEvent(noise_multiplier=noise)
        ):
            return np.array([1 - rate, rate]), np.array([0, 1 / noise])
        case TruncatedSubsampledGaussianDpEvent(sampling_probability=rate, noise_multiplier=noise):
            return np.array([1 - rate, rate]), np.array([0, 1 / noise])
        case KnownBranchDpEvent(usual=usual, rare=rare, probability=probability):
            of_usual, of_rare = _shift_distribution(usual), _shift_distribution(rare)
            if of_usual is None or of_rare is None:
                return None
            weights = [(1 - probability) * of_usual[0], probability * of_rare[0]]
            return np.concatenate(weights), np.concatenate([of_usual[1], of_rare[1]])
        case MixtureOfGaussiansDpEvent():
            moves = np.asarray(step.sensitivities) / step.standard_deviation
            return np.asarray(step.sampling_probs), moves
        case dp_accounting.SampledWithoutReplacementDpEvent(
            source_dataset_size=size,
            sample_size=sample,
            event=dp_accounting.GaussianDpEvent(noise_multiplier=noise),
        ):
            return np.array([1 - sample / size, sample / size]), np.array([0, 2 / noise])
    return None
