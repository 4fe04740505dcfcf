"""A one-step event and a grid in, the distribution of its privacy loss out; and which grid."""

import functools
import math

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent, TruncatedSubsampledGaussianDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld

from dpoptax._dp_events import KnownMixtureDpEvent
from dpoptax.accounting import _subsampled_gaussian as subsampled

FINEST, USUAL, COARSEST = 1e-7, 1e-4, 1e-3
MOST_POINTS = 125_000
MANY = 10
# Times as many where truncation is taken exactly: there two laws of different scale are mixed.
TRUNCATED_POINTS = 4


def grid_step(counts: dict[dp_accounting.DpEvent, int]) -> float:
    """Returns a grid on which a run costs about a thousandth more than it should, at most.

    Rounding a loss L to a grid of step h, its mean kept, adds up to h E|L| to its variance. The
    step is such that this is a twentieth of the variance where a step costs little, far less
    elsewhere. dp-accounting's default of 1e-4 overstates epsilon by multiples where a step costs
    less, and takes seconds where it costs much.

    Too fine a grid fails by rounding: dp-accounting's distributions sum to 1 + 1e-18 / h^2 or so,
    which many steps raise to a power.
    """
    variance = size = 0.0
    coarsest = COARSEST
    finest = max(FINEST, 1e-9 * math.sqrt(sum(counts.values())))
    for step, count in counts.items():
        law = _law(step)
        if law is None:
            return USUAL
        probabilities, moves = law
        joins = float(probabilities[moves > 0].sum())
        exponents = np.minimum(np.outer(moves, moves), 300.0)
        spread = math.sqrt(probabilities @ np.expm1(exponents) @ probabilities)
        variance += count * spread**2
        size += count * min(spread, 2 * joins)
        coarsest = max(coarsest, USUAL * float(moves.max()) ** 2)
        finest = max(finest, _longest_loss(step) / MOST_POINTS)
    share = 20 if len(counts) <= MANY else 8  # a schedule takes its time
    return max(min(variance / size / share, coarsest), finest) if size else USUAL


@functools.lru_cache(maxsize=16)
def one_step(
    step: dp_accounting.DpEvent, relation: NeighboringRelation, grid_step: float
) -> pld.PrivacyLossDistribution:
    """Returns the distribution of the loss of a step, an upper bound.

    Args:
        step: no composition.
        relation: which data sets count as neighbours.
        grid_step: of the discretisation, in epsilon.

    Returns:
        A distribution on the grid.

    Raises:
        dp_accounting.UnsupportedEventError: nothing is known of such a step under that relation.
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
            if not replaces and rate <= 0.5:
                return subsampled.poisson(rate, noise, grid_step)
            return pld.from_gaussian_mechanism(
                noise, sampling_prob=rate, neighboring_relation=relation, **grid
            )
        case TruncatedSubsampledGaussianDpEvent():
            return pld.from_truncated_subsampled_gaussian_mechanism(
                dataset_size=step.dataset_size,
                sampling_probability=step.sampling_probability,
                truncated_batch_size=step.truncated_batch_size,
                noise_multiplier=step.noise_multiplier,
                neighboring_relation=relation,
                **grid,
            )
        case dp_accounting.SampledWithoutReplacementDpEvent(
            source_dataset_size=size,
            sample_size=sample,
            event=dp_accounting.GaussianDpEvent(noise_multiplier=noise),
        ):
            if adds:  # one more evicts another: the law of Poisson batches at half the noise
                gaussian = dp_accounting.GaussianDpEvent(noise / 2)
                poisson = dp_accounting.PoissonSampledDpEvent(sample / size, gaussian)
                return one_step(poisson, relation, grid_step)
            return subsampled.without_replacement(sample / size, noise, grid_step)
        case KnownMixtureDpEvent(usual=usual, rare=rare, probability=probability):
            return one_step(rare, relation, grid_step).compute_mixture(
                one_step(usual, relation, grid_step), probability
            )
        case MixtureOfGaussiansDpEvent() if not replaces:
            return pld.from_mixture_gaussian_mechanism(
                step.standard_deviation, step.sensitivities, step.sampling_probs, **grid
            )
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
    raise dp_accounting.UnsupportedEventError(
        f"no privacy loss distribution is known of {step!r} under {relation.name.lower()}."
    )


def _longest_loss(step: dp_accounting.DpEvent) -> float:
    """About the largest loss on the grid; inf where it is not known."""
    if isinstance(step, TruncatedSubsampledGaussianDpEvent):
        # Where one evicts another; rare, so that fewer points would be felt.
        move = 4 / step.noise_multiplier
        return (move**2 / 2 + 10 * move) / TRUNCATED_POINTS
    law = _law(step)
    if law is None:
        return math.inf
    probabilities, moves = law
    joins, largest = float(probabilities[moves > 0].sum()), float(moves.max())
    exponent = largest**2 / 2 + 10 * largest
    return (
        math.log(joins) + exponent if exponent > 700 else math.log1p(joins * math.expm1(exponent))
    )


def _law(step: dp_accounting.DpEvent) -> tuple[np.ndarray, np.ndarray] | None:
    """With which probabilities an example moves the sum by how much, in units of the noise."""
    match step:
        case dp_accounting.GaussianDpEvent(noise_multiplier=noise):
            return np.ones(1), np.array([1 / noise])
        case dp_accounting.PoissonSampledDpEvent(
            sampling_probability=rate, event=dp_accounting.GaussianDpEvent(noise_multiplier=noise)
        ):
            return np.array([1 - rate, rate]), np.array([0, 1 / noise])
        case TruncatedSubsampledGaussianDpEvent(sampling_probability=rate, noise_multiplier=noise):
            return np.array([1 - rate, rate]), np.array([0, 1 / noise])
        case KnownMixtureDpEvent(usual=usual, rare=rare, probability=probability):
            of_usual, of_rare = _law(usual), _law(rare)
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
