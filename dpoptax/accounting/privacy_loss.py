"""A sampler, a noise multiplier and a number of steps in; epsilon at a delta out.

The mathematics is dp-accounting's privacy loss distribution (PLD), an upper bound that is tight
up to its grid. This file owns what surrounds it: which event a sampler means, which relation, and
how fine the grid must be. The convention everywhere is that of the noise multiplier: standard
deviation of the noise on the sum, divided by the clip bound.
"""

import functools
import math

import dp_accounting
import scipy.stats
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent, TruncatedSubsampledGaussianDpEvent
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution

from dpoptax import _checks
from dpoptax.accounting import without_replacement
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers import Sampler

# The share of delta that may pay for batches beyond their capacity before the exact law of
# truncation, ten times slower to compute, is taken instead.
OVERFLOW_SHARE = 1e-3


def epsilon(
    *,
    sampler: Sampler,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    relation: Relation = "add_or_remove_one",
) -> float:
    """Returns the epsilon that `num_steps` noisy sums over batches of `sampler` cost at `delta`.

    Args:
        sampler: the sampler that ran; its law is the one accounted.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound.
            Zero costs `math.inf`.
        num_steps: how many releases there were. Zero costs nothing.
        delta: strictly between 0 and 1, well below 1 / num_examples.
        relation: which data sets count as neighbours; see `dpoptax.relations`.

    Returns:
        Epsilon, an upper bound.

    Raises:
        TypeError: a count that is not whole, a number that is not real.
        ValueError: a number out of range, an unknown relation.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> sampler = Poisson(num_examples=60_000, expected_batch_size=128)
        >>> eps = epsilon(sampler=sampler, noise_multiplier=1.1, num_steps=9380, delta=1e-5)
        >>> round(eps, 3)
        0.89

    Reference: Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380.
    """
    noise_multiplier = _checks.non_negative("noise_multiplier", noise_multiplier)
    num_steps = _checks.count("num_steps", num_steps, at_least=0)
    delta = _checks.open_unit("delta", delta)
    parsed = parse_relation(relation)
    if num_steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    event = sampler.event(noise_multiplier, num_steps, parsed)
    return event_epsilon(event, delta=delta, relation=parsed)


def event_epsilon(
    event: dp_accounting.DpEvent,
    *,
    delta: float,
    relation: Relation = "add_or_remove_one",
    coarsening: float = 1.0,
) -> float:
    """Returns the epsilon of any dp-accounting event that its PLD accountant supports.

    Args:
        event: noise multipliers in it are relative to the clip bound, never to the sensitivity.
        delta: strictly between 0 and 1.
        relation: which data sets count as neighbours.
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
    delta = _checks.open_unit("delta", delta)
    parsed = parse_relation(relation)
    step, count = _step_and_count(event)
    overflow, untruncated = _without_overflow(step)
    if count * overflow <= OVERFLOW_SHARE * delta:
        # Given that at no step the *other* examples fill the batch, which has the same
        # probability on both neighbours, the mechanism is the untruncated one; what is left
        # is paid from delta.
        step = untruncated
        delta -= count * overflow
    if isinstance(step, dp_accounting.GaussianDpEvent):
        # Gaussians compose to a Gaussian.
        event = dp_accounting.GaussianDpEvent(step.noise_multiplier / math.sqrt(count))
    if (rate_and_noise := _rate_and_noise(step)) is not None:
        one_step = _one_step(step, parsed, coarsening * _grid_step(*rate_and_noise))
        return float(one_step.self_compose(count).get_epsilon_for_delta(delta))
    accountant = PLDAccountant(parsed)
    accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def _step_and_count(event: dp_accounting.DpEvent) -> tuple[dp_accounting.DpEvent, int]:
    count = 1
    while isinstance(event, dp_accounting.SelfComposedDpEvent):
        event, count = event.event, count * event.count
    return event, count


def _without_overflow(step: dp_accounting.DpEvent) -> tuple[float, dp_accounting.DpEvent]:
    """The probability that the others alone fill a batch, and the event where they do not."""
    match step:
        case TruncatedSubsampledGaussianDpEvent(
            dataset_size=size,
            sampling_probability=rate,
            truncated_batch_size=capacity,
            noise_multiplier=noise_multiplier,
        ):
            overflow = float(scipy.stats.binom.sf(capacity - 1, size - 1, rate))
            gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
            return overflow, dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        case MixtureOfGaussiansDpEvent(
            standard_deviation=deviation, sensitivities=(1.0, 2.0), sampling_probs=(_, overflow)
        ):
            return overflow, dp_accounting.GaussianDpEvent(deviation)
    return 0.0, step


def _rate_and_noise(step: dp_accounting.DpEvent) -> tuple[float, float] | None:
    match step:
        case dp_accounting.PoissonSampledDpEvent(
            sampling_probability=rate,
            event=dp_accounting.GaussianDpEvent(noise_multiplier=noise_multiplier),
        ):
            return rate, noise_multiplier
        case TruncatedSubsampledGaussianDpEvent(
            sampling_probability=rate, noise_multiplier=noise_multiplier
        ):
            return rate, noise_multiplier
        case dp_accounting.SampledWithoutReplacementDpEvent(
            source_dataset_size=size,
            sample_size=sample,
            event=dp_accounting.GaussianDpEvent(noise_multiplier=noise_multiplier),
        ):
            return sample / size, noise_multiplier
    return None


def _grid_step(rate: float, noise_multiplier: float) -> float:
    """A tenth of the standard deviation of one step's privacy loss, within [1e-7, 1e-4].

    dp-accounting's default of 1e-4 overstates epsilon by multiples where a step costs less.
    """
    spread = rate * math.sqrt(math.expm1(min(noise_multiplier**-2, 700.0)))
    return min(max(spread / 10, 1e-7), 1e-4)


@functools.lru_cache(maxsize=64)
def _one_step(
    step: dp_accounting.DpEvent, relation: NeighboringRelation, grid_step: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    if isinstance(step, TruncatedSubsampledGaussianDpEvent):
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=step.dataset_size,
            sampling_probability=step.sampling_probability,
            truncated_batch_size=step.truncated_batch_size,
            noise_multiplier=step.noise_multiplier,
            value_discretization_interval=grid_step,
            neighboring_relation=relation,
        )
    if isinstance(step, dp_accounting.SampledWithoutReplacementDpEvent):
        rate = step.sample_size / step.source_dataset_size
        return without_replacement.one_step(rate, step.event.noise_multiplier, relation, grid_step)
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=step.event.noise_multiplier,
        sampling_prob=step.sampling_probability,
        value_discretization_interval=grid_step,
        neighboring_relation=relation,
    )
