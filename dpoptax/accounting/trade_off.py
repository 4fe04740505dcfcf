"""Membership inference bounds: what a privacy loss lets the best possible attacker find out.

`Plan.privacy_loss` returns the privacy loss of a run, and `dpoptax.Report` has the usual bounds.
The attacker wants to know whether one given example was used. The attacker knows all other
examples, sees everything that is released, and decides optimally. Real attackers do worse.
"""

import math

import numpy as np
import scipy.special

from dpoptax import _validate
from dpoptax.accounting._epsilon import PrivacyLoss

__all__ = ["advantage", "posterior_belief", "true_positive_rates"]

# The curve of delta over epsilon is evaluated at this many points. Each point gives a valid bound,
# so that more points only make the bounds tighter.
NUM_POINTS = 2000
# The curve ends at this delta: at smaller ones the rounding of 1e-13 becomes visible.
SMALLEST_DELTA = 1e-10
# The smallest false positive rate that `dominating_mu` compares; smaller ones need smaller deltas.
SMALLEST_RATE = 1e-6


def advantage(loss: PrivacyLoss) -> float:
    """Returns the largest difference of an attacker's true and false positive rates.

    Args:
        loss: the privacy loss of the run.

    Returns:
        delta at epsilon 0, which is the total variation distance between neighbours.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(100, 100), clip=1.0, noise_multiplier=2.0,
        ...     num_steps=1, delta=1e-6,
        ... )
        >>> loss = plan.privacy_loss()
        >>> round(advantage(loss), 4)
        0.1974
    """
    return loss.delta(0.0)


def true_positive_rates(
    loss: PrivacyLoss, false_positive_rates: np.ndarray | list[float]
) -> np.ndarray:
    """Returns the largest true positive rate (TPR) at each false positive rate (FPR).

    TPR <= exp(epsilon) FPR + delta and 1 - FPR <= exp(epsilon) (1 - TPR) + delta at every epsilon
    (Kairouz, Oh, Viswanath 2015, arXiv:1311.0776; Dong, Roth, Su 2019, arXiv:1905.02383).

    Args:
        loss: the privacy loss of the run.
        false_positive_rates: probabilities.

    Returns:
        Upper bounds on the true positive rates.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(100, 100), clip=1.0, noise_multiplier=1.0,
        ...     num_steps=1, delta=1e-6,
        ... )
        >>> loss = plan.privacy_loss()
        >>> true_positive_rates(loss, [0.01]).round(3)  # Phi(Phi^-1(0.01) + 1)
        array([0.092])
    """
    rates = np.asarray(false_positive_rates, float)[:, None]
    epsilons, deltas = _curve(loss)
    found = np.exp(np.minimum(epsilons, 700.0)) * rates + deltas
    missed = np.exp(-epsilons) * (1 - deltas - rates)
    return np.clip(np.minimum(found, 1 - missed).min(axis=1), rates[:, 0], 1.0)


def posterior_belief(epsilon: float, prior: float) -> float:
    """Returns how far a release can raise an attacker's belief that an example was used.

    Args:
        epsilon: of the guarantee. The bound holds except with probability delta.
        prior: the probability that the attacker assigns before the release.

    Returns:
        The largest probability that the attacker can assign after it.

    Example:
        >>> round(posterior_belief(1.0, 0.5), 3)
        0.731
    """
    odds = math.log(_validate.open_unit("prior", prior)) - math.log1p(-prior)
    return float(scipy.special.expit(epsilon + odds))


def dominating_mu(loss: PrivacyLoss) -> float:
    """Returns the smallest mu such that the run is at least as private as mu-GDP.

    mu-GDP (Gaussian differential privacy) is the privacy of one value released with Gaussian noise
    of standard deviation 1 / mu times its sensitivity. The two are compared at 400 false positive
    rates from 1e-6 to 1 - 1e-6.

    Args:
        loss: the privacy loss of the run.

    Returns:
        mu; inf without noise.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(100, 100), clip=1.0, noise_multiplier=2.0,
        ...     num_steps=1, delta=1e-6,
        ... )
        >>> loss = plan.privacy_loss()
        >>> round(dominating_mu(loss), 3)
        0.5

    Reference: Dong, Roth, Su 2019, arXiv:1905.02383.
    """
    if loss.directions is None:
        return math.inf
    rates = np.geomspace(SMALLEST_RATE, 0.5, 200)
    rates = np.concatenate([rates, 1 - rates])
    found = true_positive_rates(loss, rates)
    # A Gaussian has TPR = Phi(Phi^-1(FPR) + mu).
    return float(max(np.max(scipy.special.ndtri(found) - scipy.special.ndtri(rates)), 0.0))


def _curve(loss: PrivacyLoss) -> tuple[np.ndarray, np.ndarray]:
    """Epsilons and their deltas."""
    largest = loss.epsilon(max(SMALLEST_DELTA, 2 * loss.overflow))
    if math.isinf(largest):
        return np.zeros(1), np.ones(1)
    epsilons = np.linspace(0.0, largest, NUM_POINTS)
    return epsilons, loss.deltas(epsilons)
