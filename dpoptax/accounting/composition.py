"""Distributions of the loss of single steps, and counts, in; epsilon and delta of them all out.

dp-accounting composes by one FFT, whose rounding, 1e-16 of the largest probability per step, is
absolute: it hides what lies far in the tail, and epsilon at a delta of 1e-12 came out too small.
Here the distributions are tilted by exp(theta * loss) first, such that the loss asked for lies in
the middle, and tilted back after: the rounding is then relative to the delta asked for. This is
the change of measure of large-deviation theory (Esscher 1932); on privacy losses, e.g. Alghamdi
et al. 2023, arXiv:2208.09595.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.fft
import scipy.optimize
import scipy.special
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# The logarithm of what is neglected outside the window, relative to what is asked for.
NEGLIGIBLE = -45.0
LARGEST_TILT = 1e5


@dataclasses.dataclass(frozen=True, eq=False)
class StepLoss:
    """The loss of one kind of step, in one direction.

    Attributes:
        log_probs: of the grid points from `lowest` on.
        lowest: in grid steps.
        infinite: the probability of an infinite loss.
        count: how often the step ran.
    """

    log_probs: np.ndarray
    lowest: int
    infinite: float
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Composition:
    """The loss of all steps together, in one direction of neighbours."""

    steps: Sequence[StepLoss]
    grid_step: float

    def epsilon(self, delta: float) -> float:
        """Returns the least epsilon at which delta suffices; inf if there is none."""
        rest = delta - self._infinite()
        if rest <= 0:
            return math.inf
        if self._deltas(np.zeros(1), self._tilt(0.0))[0] <= rest:
            return 0.0
        # Chernoff: delta <= exp(K(t) - t epsilon), with equality up to a factor at epsilon = K'(t).
        low, high = 1e-6, 1.0
        while self._exponent(high) > math.log(rest) and high < LARGEST_TILT:
            low, high = high, 2 * high
        for _ in range(25):
            middle = math.sqrt(low * high)
            if self._exponent(middle) > math.log(rest):
                low = middle
            else:
                high = middle
        losses, probs = self._tilted_back(high)
        above = np.cumsum(probs[::-1])[::-1]
        discounted = np.cumsum((probs * np.exp(-losses))[::-1])[::-1]
        # Between two losses delta(epsilon) = above - exp(epsilon) * discounted, of what is above.
        at_losses = above - np.exp(losses) * discounted
        first = int(np.argmax(at_losses <= rest))
        if discounted[first] <= 0 or above[first] <= rest:
            return max(float(losses[first]), 0.0)
        inside = math.log((above[first] - rest) / discounted[first])
        return max(min(inside, float(losses[first])), 0.0)

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        """Returns delta at each epsilon, to an absolute 1e-13 or so, rounded up."""
        slack = 1e-13 + 1e-15 * sum(step.count for step in self.steps)
        return self._deltas(epsilons, 0.0) + self._infinite() + slack

    def _deltas(self, epsilons: np.ndarray, tilt: float) -> np.ndarray:
        losses, probs = self._tilted_back(tilt)
        above = np.append(np.cumsum(probs[::-1])[::-1], 0.0)
        with np.errstate(over="ignore"):
            discounted = probs * np.exp(np.minimum(-losses, 600.0))
        discounted = np.append(np.cumsum(discounted[::-1])[::-1], 0.0)
        first = np.searchsorted(losses, epsilons, side="right")
        with np.errstate(over="ignore", invalid="ignore"):
            below = np.where(discounted[first] > 0, np.exp(epsilons) * discounted[first], 0.0)
        return np.clip(above[first] - below, 0.0, 1.0)

    def _infinite(self) -> float:
        return -math.expm1(sum(s.count * math.log1p(-min(s.infinite, 0.5)) for s in self.steps))

    def _moments(self, tilt: float) -> tuple[float, float, float]:
        """The cumulant generating function at a tilt, and the mean and variance there."""
        log_mass = mean = variance = 0.0
        for step in self.steps:
            losses = self.grid_step * (step.lowest + np.arange(len(step.log_probs)))
            exponents = step.log_probs + tilt * losses
            mass = float(scipy.special.logsumexp(exponents))
            probs = np.exp(exponents - mass)
            center = float(probs @ losses)
            log_mass += step.count * mass
            mean += step.count * center
            variance += step.count * float(probs @ np.square(losses - center))
        return log_mass, mean, variance

    def _exponent(self, tilt: float) -> float:
        log_mass, mean, _ = self._moments(tilt)
        return log_mass - tilt * mean

    def _tilt(self, epsilon: float) -> float:
        """The tilt that brings the mean to epsilon, where it is not there already."""
        if self._moments(0.0)[1] >= epsilon:
            return 0.0
        high = 1.0
        while self._moments(high)[1] < epsilon and high < LARGEST_TILT:
            high *= 2
        if high >= LARGEST_TILT:
            return 0.0
        return float(
            scipy.optimize.brentq(lambda t: self._moments(t)[1] - epsilon, 0.0, high, rtol=1e-2)
        )

    def _window(self, tilt: float) -> tuple[int, int]:
        """The grid points beyond which the tilted sum has negligible mass, by Chernoff's bound."""
        log_mass, mean, variance = self._moments(tilt)
        scale = max(math.sqrt(variance), self.grid_step)
        reach = {1: math.inf, -1: math.inf}
        for sign in reach:
            for factor in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
                shift = sign * factor / scale
                grown, _, _ = self._moments(tilt + shift)
                bound = (grown - log_mass - shift * mean - NEGLIGIBLE) / abs(shift)
                reach[sign] = min(reach[sign], bound)
        low = math.floor((mean - reach[-1]) / self.grid_step) - 1
        return low, math.ceil((mean + reach[1]) / self.grid_step) + 1

    def _tilted_back(self, tilt: float) -> tuple[np.ndarray, np.ndarray]:
        """The losses around the middle of the tilted sum, and their probabilities without tilt."""
        low, high = self._window(tilt)
        length = scipy.fft.next_fast_len(high - low + 1, real=True)
        spectrum: np.ndarray | float = 1.0
        log_mass = 0.0
        for step in self.steps:
            places = step.lowest + np.arange(len(step.log_probs))
            exponents = step.log_probs + tilt * self.grid_step * places
            mass = float(scipy.special.logsumexp(exponents))
            log_mass += step.count * mass
            folded = np.bincount(
                places % length, weights=np.exp(exponents - mass), minlength=length
            )
            spectrum = spectrum * scipy.fft.rfft(folded) ** step.count
        sums = np.maximum(scipy.fft.irfft(spectrum, length), 0.0)
        places = low + np.arange(length)
        losses = self.grid_step * places
        exponents = np.minimum(log_mass - tilt * losses, 700.0)
        return losses, sums[places % length] * np.exp(exponents)


def compositions(
    runs: Sequence[tuple[PrivacyLossDistribution, int]], grid_step: float
) -> list[Composition]:
    """Returns the loss of steps together, in each direction of neighbours.

    Args:
        runs: distributions of one step on one grid, and how often each ran.
        grid_step: of that grid.

    Returns:
        One composition where both directions are alike, two otherwise.
    """
    removed = [_step_loss(one._pmf_remove, count) for one, count in runs]
    added = [_step_loss(one._pmf_add, count) for one, count in runs]
    if all(one._pmf_add is one._pmf_remove for one, _ in runs):
        return [Composition(removed, grid_step)]
    return [Composition(removed, grid_step), Composition(added, grid_step)]


def _step_loss(pmf: pld_pmf.PLDPmf, count: int) -> StepLoss:
    # dp-accounting has no public way to the probabilities of a distribution.
    dense = pmf.to_dense_pmf()
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.maximum(np.asarray(dense._probs), 0.0))
    return StepLoss(log_probs, dense._lower_loss, float(dense._infinity_mass), count)
