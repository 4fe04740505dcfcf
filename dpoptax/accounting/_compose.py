"""Distributions of the loss of single steps, and counts, in; epsilon and delta of them all out.

dp-accounting composes by one FFT, whose rounding, 1e-16 of the largest probability per step, is
absolute: it hides what lies far in the tail, and epsilon at a delta of 1e-12 came out too small.
Here the distributions are tilted by exp(theta * loss) first, such that the loss asked for lies in
the middle, and tilted back after: the rounding is then relative to the delta asked for. This is
the change of measure of large-deviation theory (Esscher 1932); on privacy losses, e.g. Alghamdi
et al. 2023, arXiv:2208.09595.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy.fft
import scipy.optimize
import scipy.signal
import scipy.special
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# The logarithm of what is neglected outside the window, relative to what is asked for.
NEGLIGIBLE = -45.0
# In units of 1 / grid step: beyond, all is on the last point.
LARGEST_TILT = 30.0
# Beyond so many points in a window only Chernoff's bound is taken: epsilon is in the hundreds.
MOST_POINTS = 2**22
# The least share of the tilted sum on either side of epsilon for which rounding is small there.
SMALLEST_SHARE = 1e-5
MOST_TRIALS = 30


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

    def __post_init__(self) -> None:
        for name in ("_moments", "_window"):  # asked for again and again at the same tilts
            object.__setattr__(self, name, functools.cache(getattr(self, name)))

    def epsilon(self, delta: float) -> float:
        """Returns the least epsilon at which delta suffices; inf if there is none."""
        rest = delta - self._infinite()
        if rest <= 0:
            return math.inf
        tilt = self._tilt_for_delta(math.log(rest))
        lowest, highest = 0.0, math.inf
        for _ in range(MOST_TRIALS):
            if self._size(tilt) > MOST_POINTS:
                break
            losses, probs, tilted = self._tilted_back(tilt)
            above, discounted = self._tails(probs)
            # From above: far below the middle rounding, tilted back, is all there is.
            exceeding = np.flatnonzero(above - discounted > rest)
            first = int(exceeding[-1]) + 1 if len(exceeding) else 0
            # Epsilon must lie in the bulk of the tilted sum, or rounding has its say.
            if tilted[first:].sum() < SMALLEST_SHARE:
                lowest = tilt
            elif tilted[: first + 1].sum() < SMALLEST_SHARE:
                highest = tilt
            else:
                return self._between(losses, above, discounted, first, rest)
            tilt = 2 * tilt if math.isinf(highest) else (lowest + highest) / 2
        if self._size(0.0) <= MOST_POINTS and self.deltas(np.zeros(1))[0] <= delta:
            return 0.0
        return self._chernoff(math.log(rest))

    @staticmethod
    def _between(
        losses: np.ndarray, above: np.ndarray, discounted: np.ndarray, first: int, rest: float
    ) -> float:
        """Solves delta(epsilon) = above - exp(epsilon - loss) * discounted, of the loss `first`.

        That holds from the loss before it up to itself.
        """
        inside = 0.0
        if discounted[first] > 0 and above[first] > rest:
            inside = min(math.log((above[first] - rest) / discounted[first]), 0.0)
        return max(float(losses[first]) + inside, 0.0)

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        """Returns delta at each epsilon, to an absolute 1e-13 or so, rounded up."""
        if self._size(0.0) > MOST_POINTS:
            tilts, log_masses = self._chernoff_curve()
            bounds = np.min(log_masses[:, None] - tilts[:, None] * epsilons, axis=0)
            return np.exp(np.minimum(bounds, 0.0)) + self._infinite()
        losses, probs, _ = self._tilted_back(0.0)
        above, discounted = (np.append(tail, 0.0) for tail in self._tails(probs))
        following = np.searchsorted(losses, epsilons, side="right")
        gaps = epsilons - np.append(losses, math.inf)[following]
        finite = np.clip(above[following] - np.exp(gaps) * discounted[following], 0.0, 1.0)
        slack = 1e-13 + 1e-15 * sum(step.count for step in self.steps)
        return finite + self._infinite() + slack

    def _chernoff(self, log_delta: float) -> float:
        """An upper bound of epsilon that needs no window."""
        tilts, log_masses = self._chernoff_curve()
        return max(float(np.min((log_masses - log_delta) / tilts)), 0.0)

    def _chernoff_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Tilts t and K(t): log delta(epsilon) <= K(t) - t epsilon at every one of them."""
        tilts = np.geomspace(1e-2, LARGEST_TILT / self.grid_step, 100)
        return tilts, np.array([self._moments(float(tilt))[0] for tilt in tilts])

    def _tails(self, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From each loss l on, the sum of the probabilities, plain and times exp(l - loss)."""
        above = np.cumsum(probs[::-1])[::-1]
        decay = [1.0, -math.exp(-self.grid_step)]
        return above, scipy.signal.lfilter([1.0], decay, probs[::-1])[::-1]

    def _infinite(self) -> float:
        if any(step.infinite >= 1 for step in self.steps):
            return 1.0
        return -math.expm1(sum(step.count * math.log1p(-step.infinite) for step in self.steps))

    def _tilted(self, step: StepLoss, tilt: float) -> tuple[np.ndarray, np.ndarray, float]:
        """The grid points of one step, their tilted probabilities, and the log of their sum."""
        places = step.lowest + np.arange(len(step.log_probs))
        exponents = step.log_probs + tilt * (self.grid_step * places)
        mass = float(scipy.special.logsumexp(exponents))
        return places, np.exp(exponents - mass), mass

    def _moments(self, tilt: float) -> tuple[float, float, float]:
        """The cumulant generating function at a tilt, and the mean and variance there."""
        log_mass = mean = variance = 0.0
        for step in self.steps:
            places, probs, mass = self._tilted(step, tilt)
            losses = self.grid_step * places
            center = float(probs @ losses)
            log_mass += step.count * mass
            mean += step.count * center
            variance += step.count * float(probs @ np.square(losses - center))
        return log_mass, mean, variance

    def _tilt_for_delta(self, log_delta: float) -> float:
        """The tilt that brings the mean to where delta is about that.

        By Chernoff's bound delta(epsilon) <= exp(K(t) - t epsilon), with equality up to a factor
        at epsilon = K'(t). Where losses are rare and large, K' all but jumps, so it must be met
        well.
        """

        def beyond(tilt: float) -> float:
            log_mass, mean, _ = self._moments(tilt)
            return log_mass - tilt * mean - log_delta

        low, high = 0.0, 1.0
        while beyond(high) > 0:
            if high * self.grid_step >= LARGEST_TILT:
                return high
            low, high = high, 2 * high
        return float(scipy.optimize.brentq(beyond, low, high, xtol=1e-4 * high, rtol=1e-4))

    def _size(self, tilt: float) -> int:
        low, high = self._window(tilt)
        return high - low

    def _window(self, tilt: float) -> tuple[int, int]:
        """The grid points beyond which the tilted sum has negligible mass, by Chernoff's bound."""
        log_mass, mean, variance = self._moments(tilt)
        scale = max(math.sqrt(variance), self.grid_step)
        reach = {1: math.inf, -1: math.inf}
        for sign in reach:
            for factor in (0.03, 0.2, 1.0, 3.0, 10.0):
                shift = sign * factor / scale
                grown, _, _ = self._moments(tilt + shift)
                bound = (grown - log_mass - shift * mean - NEGLIGIBLE) / abs(shift)
                reach[sign] = min(reach[sign], bound)
        low = math.floor((mean - reach[-1]) / self.grid_step) - 1
        return low, math.ceil((mean + reach[1]) / self.grid_step) + 1

    def _tilted_back(self, tilt: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses around the middle of the tilted sum, their probabilities without and with tilt."""
        low, high = self._window(tilt)
        length = scipy.fft.next_fast_len(high - low + 1, real=True)
        spectrum: np.ndarray | float = 1.0
        log_mass = 0.0
        for step in self.steps:
            places, probs, mass = self._tilted(step, tilt)
            log_mass += step.count * mass
            folded = np.bincount(places % length, weights=probs, minlength=length)
            spectrum = spectrum * scipy.fft.rfft(folded) ** step.count
        sums = np.maximum(scipy.fft.irfft(spectrum, length), 0.0)
        places = low + np.arange(length)
        losses = self.grid_step * places
        exponents = np.minimum(log_mass - tilt * losses, 700.0)
        tilted = sums[places % length]
        return losses, tilted * np.exp(exponents), tilted


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
    probs = np.asarray(dense._probs)
    present = np.flatnonzero(probs > 0)
    first, last = present[0], present[-1] + 1
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.maximum(probs[first:last], 0.0))
    lowest = int(dense._lower_loss + first)
    return StepLoss(log_probs, lowest, float(dense._infinity_mass), count)
