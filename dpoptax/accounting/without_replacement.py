"""Batches of a fixed size without replacement: the privacy loss of one noisy sum.

A batch is always full, so one example more in the data, or another in its place, means one
exchanged in the batch: a move of twice the clip bound. dp-accounting has no privacy loss
distribution for it, and its Rényi accountant takes the noise for relative to that move.
"""

import math

import numpy as np
import scipy.stats
from dp_accounting import NeighboringRelation
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_gaussian_mechanism,
)

# Of one step's loss, what lies beyond the grid is taken as lost.
TAIL = 1e-20


def one_step(
    sampling_rate: float, noise_multiplier: float, relation: NeighboringRelation, grid_step: float
) -> PrivacyLossDistribution:
    """Returns the distribution of the privacy loss of one noisy sum, an upper bound.

    Under add-or-remove-one it is that of a Poisson batch at half the noise multiplier. Otherwise
    it follows from the profile of substitution, for epsilon >= 0

        delta(epsilon) = q delta_G(log(1 + (exp(epsilon) - 1) / q)),
        delta(-epsilon) = 1 - exp(-epsilon) + exp(-epsilon) delta(epsilon),

    with delta_G that of a Gaussian moved by twice the clip bound.

    Args:
        sampling_rate: q, batch_size / num_examples.
        noise_multiplier: relative to the clip bound.
        relation: which data sets count as neighbours.
        grid_step: of the discretisation, in epsilon.

    Returns:
        A distribution on the grid.

    Reference: Balle, Barthe, Gaboardi 2018, arXiv:1807.01647.
    """
    if relation == NeighboringRelation.ADD_OR_REMOVE_ONE:
        return from_gaussian_mechanism(
            standard_deviation=noise_multiplier / 2,
            sampling_prob=sampling_rate,
            value_discretization_interval=grid_step,
        )
    last = math.ceil(_largest_loss(sampling_rate, noise_multiplier) / grid_step)
    epsilons = grid_step * np.arange(last + 1)
    above = _profile(epsilons, sampling_rate, noise_multiplier)
    below = -np.expm1(-epsilons) + np.exp(-epsilons) * above
    rounded = np.arange(-last, last + 1)
    deltas = np.concatenate([below[:0:-1], above])
    return PrivacyLossDistribution(
        pld_pmf.create_pmf_pessimistic_connect_dots(grid_step, rounded, deltas)
    )


def _largest_loss(rate: float, noise_multiplier: float) -> float:
    """An epsilon beyond which the profile is below TAIL."""
    shift = 2 / noise_multiplier
    gaussian = shift**2 / 2 + shift * float(scipy.stats.norm.isf(TAIL))
    return float(np.logaddexp(np.log1p(-rate), math.log(rate) + gaussian)) if rate < 1 else gaussian


def _profile(epsilons: np.ndarray, rate: float, noise_multiplier: float) -> np.ndarray:
    shift = 2 / noise_multiplier
    inner = np.log1p(np.expm1(epsilons) / rate)
    first = scipy.stats.norm.sf(inner / shift - shift / 2)
    second = np.exp(inner + scipy.stats.norm.logsf(inner / shift + shift / 2))
    return rate * np.clip(first - second, 0.0, 1.0)
