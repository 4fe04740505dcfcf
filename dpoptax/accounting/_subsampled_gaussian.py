"""Gaussian noise on a sum over a random batch: the privacy loss from a closed form.

The pair (1 - q) N(0) + q N(s) against N(0) has, at epsilon > log(1 - q), the profile

    delta(epsilon) = q delta_G(log(1 + (exp(epsilon) - 1) / q))                       (1)

with delta_G that of a Gaussian moved by s (Balle, Barthe, Gaboardi 2018, arXiv:1807.01647). It is
put on a grid by dp-accounting's connect-the-dots. dp-accounting has the Poisson law too, a point
at a time and so thirty times slower, and none for batches without replacement, where its Rényi
accountant takes the noise for relative to a move that is twice as large.
"""

import math

import numpy as np
import scipy.stats
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# Of one step's loss, what lies beyond the grid is taken as infinite.
TAIL = 1e-22


def poisson(rate: float, noise_multiplier: float, grid_step: float) -> PrivacyLossDistribution:
    """Returns the loss of one noisy sum over a Poisson batch, under add-or-remove-one.

    Args:
        rate: the probability that an example takes part, at most one half: rounding grows beyond.
        noise_multiplier: relative to the move of one example.
        grid_step: of the discretisation, in epsilon.

    Returns:
        A distribution on the grid, an upper bound.
    """
    shift = 1 / noise_multiplier
    farthest = -(shift**2) / 2 - shift * float(scipy.stats.norm.isf(TAIL))
    lowest = math.floor(math.log1p(rate * math.expm1(farthest)) / grid_step)
    highest = math.ceil(_largest_loss(rate, shift) / grid_step)
    epsilons = grid_step * np.arange(lowest, highest + 1)
    removed = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
        grid_step, lowest, highest, _profile(epsilons, rate, shift)
    ).to_dense_pmf()
    # Seen from the other side a loss has the other sign and exp(-loss) times the probability, and
    # is infinite where on this side it is below the grid.
    added = removed._probs * np.exp(-epsilons)
    return PrivacyLossDistribution(
        removed, pld_pmf.DensePLDPmf(grid_step, -highest, added[::-1], TAIL, True)
    )


def without_replacement(
    rate: float, noise_multiplier: float, grid_step: float
) -> PrivacyLossDistribution:
    """Returns the loss of one noisy sum over a full batch in which one may be exchanged.

    A batch is always full, so another example in the place of one means one exchanged in the
    batch: a move of twice the clip bound. The loss is symmetric, and follows from (1) and

        delta(-epsilon) = 1 - exp(-epsilon) + exp(-epsilon) delta(epsilon).

    Args:
        rate: batch_size / num_examples.
        noise_multiplier: relative to the clip bound.
        grid_step: of the discretisation, in epsilon.

    Returns:
        A distribution on the grid, an upper bound.
    """
    shift = 2 / noise_multiplier
    last = math.ceil(_largest_loss(rate, shift) / grid_step)
    epsilons = grid_step * np.arange(last + 1)
    above = _profile(epsilons, rate, shift)
    below = -np.expm1(-epsilons) + np.exp(-epsilons) * above
    return PrivacyLossDistribution(
        pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
            grid_step, -last, last, np.concatenate([below[:0:-1], above])
        )
    )


def _largest_loss(rate: float, shift: float) -> float:
    """An epsilon beyond which the profile is below TAIL."""
    gaussian = shift**2 / 2 + shift * float(scipy.stats.norm.isf(TAIL))
    return float(np.logaddexp(np.log1p(-rate), math.log(rate) + gaussian)) if rate < 1 else gaussian


def _profile(epsilons: np.ndarray, rate: float, shift: float) -> np.ndarray:
    """Equation (1)."""
    inner = np.full(len(epsilons), -np.inf)
    growth = np.expm1(np.minimum(epsilons, 1.0)) / rate
    beyond = growth > -1
    inner[beyond] = np.log1p(growth[beyond])
    large = epsilons > 1  # where the exponential may overflow
    inner[large] = epsilons[large] + np.log1p(-(1 - rate) * np.exp(-epsilons[large]))
    inner[large] -= math.log(rate)
    first = scipy.stats.norm.sf(inner / shift - shift / 2)
    second = np.exp(inner + scipy.stats.norm.logsf(inner / shift + shift / 2))
    deltas = rate * np.clip(first - second, 0.0, 1.0)
    return np.where(beyond, deltas, -np.expm1(np.minimum(epsilons, 0.0)))
