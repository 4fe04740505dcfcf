"""Bounds on attacks: what a privacy loss lets the best possible attacker find out.

`Plan.privacy_loss` returns the privacy loss of a run, and `dpoptax.Report` has the usual bounds.
The attacker wants to know whether one given example was used, or what it is. The attacker knows all
other examples, sees everything that is released, and decides optimally. Real attackers do worse.
"""

import math

import numpy as np
import scipy.special

from dpoptax import _validate
from dpoptax.accounting._epsilon import PrivacyLoss

__all__ = ["advantage", "posterior_belief", "reconstruction_rates", "true_positive_rates"]


def __dir__() -> list[str]:
    return __all__


# The curve of delta over epsilon is evaluated at this many points. Each point gives a valid bound,
# so that more points only make the bounds tighter.
NUM_POINTS = 2000
# The curve ends at this delta: at smaller ones the rounding of 1e-13 becomes visible.
SMALLEST_DELTA = 1e-10
# The smallest false positive rate that `dominating_mu` compares; smaller ones need smaller deltas.
SMALLEST_RATE = 1e-6
# The shares of delta at which `likely_loss` reads epsilon: the first, the smallest, and how many.
FIRST_SHARE, SMALLEST_SHARE, NUM_SHARES = 0.1, 1e-4, 3


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


def reconstruction_rates(loss: PrivacyLoss, baselines: np.ndarray | list[float]) -> np.ndarray:
    """Returns how often an attacker can reconstruct an example, at each rate of blind guesses.

    The attacker guesses the example, or a part of it such as one attribute. What counts as a
    success is up to you, for example an image within a given distance. The example is drawn from a
    distribution that the attacker knows, and is independent of the noise. The baseline is the
    probability that the best guess without the release is a success.

    The bound is the largest true positive rate at a false positive rate of `baseline`. To see this,
    take the test that says "used" if the attack on the release finds example z. If z was not used,
    the release does not depend on z, so the test is wrong with probability `baseline` at most, on
    average over z. If z was used, the test is right whenever the attack succeeds. The largest true
    positive rate is a concave function of the false positive rate, so the bound holds on average
    over z too.

    Args:
        loss: the privacy loss of the run.
        baselines: probabilities.

    Returns:
        Upper bounds on the probabilities of success.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(100, 100), clip=1.0, noise_multiplier=1.0,
        ...     num_steps=1, delta=1e-6,
        ... )
        >>> reconstruction_rates(plan.privacy_loss(), [0.1]).round(3)
        array([0.389])

    Reference: Balle, Cherubin, Hayes 2022, arXiv:2201.04845; Kaissis et al. 2023, arXiv:2307.03928.
    """
    return true_positive_rates(loss, baselines)


def posterior_belief(loss: PrivacyLoss, prior: float, delta: float) -> float:
    """Returns how far a release can raise an attacker's belief that an example was used.

    By Bayes' rule, the odds grow by the factor exp(privacy loss). Gaussian noise has no largest
    privacy loss, so that no bound below 1 holds for every release. This one fails with probability
    `delta` at most, over the noise and the batches.

    It is above what epsilon at `delta` suggests: a privacy loss exceeds epsilon more often than
    with probability delta. But delta(e) is at least the mean of 1 - exp(e - loss) where that is
    positive. So a loss exceeds x with probability delta(e) / (1 - exp(e - x)) at most, for every
    e < x.

    Args:
        loss: the privacy loss of the run.
        prior: the probability that the attacker assigns before the release.
        delta: the probability that the bound fails.

    Returns:
        The largest probability that the attacker can assign after it.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(100, 100), clip=1.0, noise_multiplier=5.0,
        ...     num_steps=1, delta=1e-6,
        ... )
        >>> round(posterior_belief(plan.privacy_loss(), prior=0.5, delta=1e-6), 3)
        0.733

    Reference: Kasiviswanathan and Smith 2014, arXiv:0803.3946; Kifer et al. 2022, arXiv:2209.03310.
    """
    odds = scipy.special.logit(_validate.open_unit("prior", prior))
    return float(scipy.special.expit(likely_loss(loss, delta) + odds))


def likely_loss(loss: PrivacyLoss, delta: float) -> float:
    """Returns what the privacy loss exceeds with probability `delta` at most."""
    if loss.delta(0.0) == 0:
        return 0.0
    # An epsilon of zero at delta does not mean that: the loss may be above zero half of the time.
    at_delta = loss.epsilon(delta)
    if math.isinf(at_delta):
        return at_delta
    # x = epsilon(share * delta) - log(1 - share) is a bound for every share. Where epsilon falls by
    # `slope` as log(delta) grows by one, the best share is slope / (1 + slope).
    smallest = max(SMALLEST_SHARE, min(2 * loss.overflow / delta, 0.5))
    best, share = math.inf, max(FIRST_SHARE, smallest)
    for _ in range(NUM_SHARES):
        inner = loss.epsilon(share * delta)
        if math.isinf(inner):
            break
        best = min(best, inner - math.log1p(-share))
        slope = (inner - at_delta) / -math.log(share)
        share = min(max(slope / (1 + slope), smallest), 0.9)
    return best


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
