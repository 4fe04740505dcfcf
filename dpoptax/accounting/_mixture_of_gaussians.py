"""Mixtures of Gaussians: the privacy loss of one sum that is moved by a random multiple.

With a group, the sum moves by m_j in units of the noise with probability w_j, and its density is
Y(z) = sum_j w_j exp(m_j z - m_j^2 / 2) times that without the group, at output z. Moves are not
negative, so Y grows with z, and the profile at epsilon = log Y(z) is

    delta = sum_j w_j delta_j,  delta_j = P(N(m_j, 1) > z) - exp(m_j z - m_j^2 / 2) P(N(0, 1) > z).

Other directions of the moves cost no more (Choquette-Choo et al. 2023, arXiv:2310.15526).
dp-accounting computes the same, one grid point at a time.
"""

import math

import numpy as np
import scipy.special
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from dpoptax.accounting._dp_accounting_compat import GridLoss, distribution, from_deltas
from dpoptax.accounting._subsampled_gaussian import TAIL, standard_deviations

# Few are needed, but where a large move becomes likely the losses have almost a kink.
MOST_ITERATIONS = 30


def mixture_of_gaussians(
    event: MixtureOfGaussiansDpEvent, grid_step: float
) -> PrivacyLossDistribution:
    """Returns the loss of one release for a group that is added or removed; an upper bound."""
    probs, moves = _without_rare(
        np.asarray(event.sampling_probs, float),
        np.asarray(event.sensitivities, float) / event.standard_deviation,
    )
    reach = standard_deviations(TAIL)
    lowest, highest = _losses(np.array([-reach, reach + moves.max()]), moves, probs)
    first, last = math.floor(lowest / grid_step), math.ceil(highest / grid_step)
    epsilons = grid_step * np.arange(first, last + 1)
    points = np.linspace(-reach - 1, 1.01 * (reach + moves.max()) + 1, 20_000)
    # Below the smallest loss the profile is 1 - exp(epsilon), which the formula gives at any
    # output that is small enough.
    outputs = np.interp(epsilons, _losses(points, moves, probs), points)
    # Newton's method for a convex function.
    for _ in range(MOST_ITERATIONS):
        found = _losses(outputs, moves, probs)
        errors = found - epsilons
        if np.all(np.abs(errors[1:-1]) < 1e-13 * (1 + np.abs(epsilons[1:-1]))):
            break
        weights = np.exp(_exponents(outputs, moves) + np.log(probs)[:, None] - found)
        slopes = (moves[:, None] * weights).sum(axis=0)
        outputs = np.clip(outputs - errors / np.maximum(slopes, 1e-300), points[0], points[-1])
    above = scipy.special.log_ndtr(-outputs)
    joins = scipy.special.ndtr(moves[:, None] - outputs)
    stays = np.exp(_exponents(outputs, moves) + above)
    deltas = probs @ np.clip(joins - stays, 0.0, 1.0)
    # This is the profile at the loss of each output. Where that is too large, the profile is larger
    # by the remaining error times its slope.
    errors = np.maximum(_losses(outputs, moves, probs) - epsilons, 0.0)
    deltas = np.minimum(deltas + errors * np.exp(np.minimum(epsilons + above, 0.0)), 1.0)
    deltas = np.maximum(deltas, -np.expm1(np.minimum(epsilons, 0.0)))
    removed = from_deltas(grid_step, first, last, deltas)
    # In the other direction the loss has the opposite sign and exp(-loss) times the probability.
    added = removed.probabilities * np.exp(-epsilons)
    return distribution(grid_step, removed, GridLoss(added[::-1], -last, TAIL))


def _without_rare(probs: np.ndarray, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gives the probability of rare moves to the largest move, which only costs more."""
    common = probs > TAIL
    largest = moves[probs > 0].max()
    return (
        np.append(probs[common], max(float(probs[~common].sum()), 1e-300)),
        np.append(moves[common], largest),
    )


def _exponents(outputs: np.ndarray, moves: np.ndarray) -> np.ndarray:
    return moves[:, None] * outputs - moves[:, None] ** 2 / 2


def _losses(outputs: np.ndarray, moves: np.ndarray, probs: np.ndarray) -> np.ndarray:
    found = scipy.special.logsumexp(_exponents(outputs, moves), b=probs[:, None], axis=0)
    return np.asarray(found)
