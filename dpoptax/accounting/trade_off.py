"""A privacy loss in; what it lets an attacker do, who would tell whether one example was used, out.

The attacker of these numbers knows everything but that example, sees every release, and is
optimal. Real ones do worse.
"""

import math

import numpy as np
import scipy.special
import scipy.stats

from dpoptax import _validate
from dpoptax.accounting._epsilon import PrivacyLoss

__all__ = ["advantage", "true_positive_rates", "posterior_belief", "dominating_mu"]

# The curve of delta over epsilon is read at so many points, down to this delta.
POINTS = 2000
SMALLEST_DELTA = 1e-10
LEAST_RATE = 1e-6


def advantage(loss: PrivacyLoss) -> float:
    """Returns the most by which an attacker's true positive rate exceeds the false positive rate.

    Args:
        loss: of the run.

    Returns:
        delta at epsilon 0, the total variation between neighbours.

    Example:
        >>> import dp_accounting
        >>> from dpoptax.accounting import event_privacy_loss
        >>> loss = event_privacy_loss(dp_accounting.GaussianDpEvent(2.0), delta=1e-6)
        >>> round(advantage(loss), 4)
        0.1974
    """
    return loss.delta(0.0)


def true_positive_rates(
    loss: PrivacyLoss, false_positive_rates: np.ndarray | list[float]
) -> np.ndarray:
    """Returns the most true positives at each rate of false positives.

    At every epsilon, TPR <= exp(epsilon) FPR + delta, and 1 - FPR <= exp(epsilon) (1 - TPR) + delta
    (Kairouz, Oh, Viswanath 2015, arXiv:1311.0776; Dong, Roth, Su 2019, arXiv:1905.02383).

    Args:
        loss: of the run.
        false_positive_rates: probabilities.

    Returns:
        Probabilities, an upper bound.

    Example:
        >>> import dp_accounting
        >>> from dpoptax.accounting import event_privacy_loss
        >>> loss = event_privacy_loss(dp_accounting.GaussianDpEvent(1.0), delta=1e-6)
        >>> true_positive_rates(loss, [0.01]).round(3)  # Phi(Phi^-1(0.01) + 1)
        array([0.092])
    """
    rates = np.asarray(false_positive_rates, float)[:, None]
    epsilons, deltas = _curve(loss)
    found = np.exp(np.minimum(epsilons, 700.0)) * rates + deltas
    missed = np.exp(-epsilons) * (1 - deltas - rates)
    return np.clip(np.minimum(found, 1 - missed).min(axis=1), rates[:, 0], 1.0)


def posterior_belief(epsilon: float, prior: float) -> float:
    """Returns the most that an attacker can believe after the release, given a belief before it.

    Args:
        epsilon: of the guarantee; the bound holds but for a probability delta.
        prior: probability of the example's having been used, in the attacker's eyes.

    Returns:
        A probability.

    Example:
        >>> round(posterior_belief(1.0, 0.5), 3)
        0.731
    """
    odds = math.log(_validate.open_unit("prior", prior)) - math.log1p(-prior)
    return float(scipy.special.expit(epsilon + odds))


def dominating_mu(loss: PrivacyLoss) -> float:
    """Returns the least mu whose Gaussian is no more private than the run, at any rate.

    The curves are compared at 400 false positive rates from 1e-6 to 1 - 1e-6.

    Args:
        loss: of the run.

    Returns:
        mu of mu-GDP: as if one value were released with noise 1 / mu; inf without noise.

    Example:
        >>> import dp_accounting
        >>> from dpoptax.accounting import event_privacy_loss
        >>> loss = event_privacy_loss(dp_accounting.GaussianDpEvent(2.0), delta=1e-6)
        >>> round(dominating_mu(loss), 3)
        0.5

    Reference: Dong, Roth, Su 2019, arXiv:1905.02383.
    """
    if loss.directions is None:
        return math.inf
    rates = np.geomspace(LEAST_RATE, 0.5, 200)
    rates = np.concatenate([rates, 1 - rates])
    found = true_positive_rates(loss, rates)
    normal = scipy.stats.norm
    return float(max(np.max(normal.ppf(found) - normal.ppf(rates)), 0.0))


def _curve(loss: PrivacyLoss) -> tuple[np.ndarray, np.ndarray]:
    largest = loss.epsilon(max(SMALLEST_DELTA, 2 * loss.overflow))
    if math.isinf(largest):
        return np.zeros(1), np.ones(1)
    epsilons = np.linspace(0.0, largest, POINTS)
    return epsilons, loss.deltas(epsilons)
