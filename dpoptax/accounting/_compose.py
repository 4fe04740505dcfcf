"""Composition: the privacy loss of many steps together, by a tilted convolution.

The privacy losses of the steps are independent, so their sum has the convolution of their
distributions. On a grid this is one fast Fourier transform (FFT), as in Koskela et al. 2020,
arXiv:1906.03049. But an FFT makes an absolute rounding error, about 1e-16 of the largest
probability per step. Probabilities far in the tail drown in it: dp-accounting, which composes this
way, returns a too small epsilon at delta = 1e-12.

The remedy is exponential tilting, the change of measure of large-deviation theory (Esscher 1932; on
privacy losses, e.g., Alghamdi et al. 2023, arXiv:2208.09595):

1. Multiply the probability of each loss l by exp(t l), and divide by the sum M(t) of these
   products. With a tilt t > 0 large losses become likely. K(t) = log M(t).
2. Choose t such that the mean of the tilted sum, K'(t), is about the epsilon that we look for. The
   tail has become the middle of the distribution.
3. Convolve the tilted distributions by FFT. Its error is now small relative to the probabilities
   near epsilon.
4. Multiply the result at each loss l by exp(K(t) - t l). This undoes the tilt exactly, since the
   exponential of a sum is the product of the exponentials.
5. Read delta(epsilon) = sum over losses l > epsilon of p(l) (1 - exp(epsilon - l)).

Chernoff's bound, log P(loss >= x) <= K(t) - t x for all t >= 0, says which losses can be left out
of the window of the FFT. Where a window would be too long, it also bounds delta itself.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import attrs
import numpy as np
import scipy.special
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from dpoptax.accounting._dp_accounting_compat import GridLoss, grid_losses

# The logarithm of the mass outside the window, relative to the mass asked for: exp(-45) is 3e-20,
# below the rounding of float64.
LOG_NEGLIGIBLE = -45.0
# The largest tilt, in units of 1 / grid step. Beyond, exp(t l) grows by exp(30) from one grid
# point to the next, so that all mass is on the last point already.
LARGEST_TILT = 30.0
# The longest window, 32 MiB of float64. Beyond, only Chernoff's bound is computed: windows get
# that long only where epsilon is in the hundreds.
MAX_POINTS = 2**22
# The smallest fraction of the tilted mass on either side of epsilon. Below, epsilon lies in the
# tail of the tilted sum as well, and rounding errors of the FFT, 1e-16 or so, begin to count.
SMALLEST_FRACTION = 1e-5
# The tilts to try until epsilon lies in the middle of the tilted sum; a bisection, so that 30 are
# ample.
MAX_TRIALS = 30
# The shifts of the tilt that Chernoff's bound is minimised over, in inverse standard deviations.
# The best shift is not needed: a worse one only makes the window longer.
TILT_SHIFTS = (0.03, 0.2, 1.0, 3.0, 10.0)


@attrs.frozen(eq=False)
class StepLoss:
    """The privacy loss of one kind of step, in one direction of neighbours.

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


class Moments(NamedTuple):
    """K(t), and the mean K'(t) and variance K''(t) of the sum of all steps tilted by t."""

    log_mass: float
    mean: float
    variance: float


class Window(NamedTuple):
    """The losses around the middle of the tilted sum, and their probabilities.

    Attributes:
        losses: a range of grid points.
        probs: the probabilities of these losses, without tilt.
        tilted: the probabilities of the tilted losses.
    """

    losses: np.ndarray
    probs: np.ndarray
    tilted: np.ndarray


@attrs.frozen(eq=False)
class Composition:
    """The privacy loss of all steps together, in one direction of neighbours."""

    steps: Sequence[StepLoss]
    grid_step: float
    # The searches ask for the same tilts again and again.
    _moments_at: dict[float, Moments] = attrs.field(factory=dict, init=False, repr=False)
    _bounds_at: dict[float, tuple[int, int]] = attrs.field(factory=dict, init=False, repr=False)

    def epsilon(self, delta: float) -> float:
        """Returns the smallest epsilon that holds at `delta`; inf if there is none."""
        # An infinite loss exceeds every epsilon: its probability is paid from delta.
        remaining = delta - self._infinite()
        if remaining <= 0:
            return math.inf
        tilt = self._tilt_for_delta(math.log(remaining))
        low, high = 0.0, math.inf
        for _ in range(MAX_TRIALS):
            if self._size(tilt) > MAX_POINTS:
                break
            window = self._window(tilt)
            above, discounted = self._tails(window.probs)
            # The search starts at the largest loss: far below the middle, the window holds little
            # but rounding errors, amplified by undoing the tilt.
            exceeding = np.flatnonzero(above - discounted > remaining)
            first = int(exceeding[-1]) + 1 if len(exceeding) else 0
            # Accept only an epsilon in the bulk of the tilted sum; otherwise bisect the tilt.
            if window.tilted[first:].sum() < SMALLEST_FRACTION:
                low = tilt
            elif window.tilted[: first + 1].sum() < SMALLEST_FRACTION:
                high = tilt
            else:
                return _between_losses(window.losses, above, discounted, first, remaining)
            tilt = 2 * tilt if math.isinf(high) else (low + high) / 2
        if self._size(0.0) <= MAX_POINTS and self.deltas(np.zeros(1))[0] <= delta:
            return 0.0
        return self._chernoff_epsilon(math.log(remaining))

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        """Returns the smallest delta at each epsilon, rounded up by about 1e-13."""
        if self._size(0.0) > MAX_POINTS:
            tilts, log_masses = self._chernoff_curve()
            bounds = np.min(log_masses[:, None] - tilts[:, None] * epsilons, axis=0)
            return np.exp(np.minimum(bounds, 0.0)) + self._infinite()
        window = self._window(0.0)
        above, discounted = (np.append(tail, 0.0) for tail in self._tails(window.probs))
        following = np.searchsorted(window.losses, epsilons, side="right")
        gaps = epsilons - np.append(window.losses, math.inf)[following]
        finite = np.clip(above[following] - np.exp(gaps) * discounted[following], 0.0, 1.0)
        # Without a tilt the FFT's rounding is absolute and grows with the number of steps. It is
        # added, so that the result stays an upper bound.
        rounding = 1e-13 + 1e-15 * sum(step.count for step in self.steps)
        return finite + self._infinite() + rounding

    def _chernoff_epsilon(self, log_delta: float) -> float:
        """An upper bound of epsilon that needs no window."""
        tilts, log_masses = self._chernoff_curve()
        return max(float(np.min((log_masses - log_delta) / tilts)), 0.0)

    def _chernoff_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Tilts t and K(t); log delta(epsilon) <= K(t) - t epsilon holds at each of them."""
        tilts = np.geomspace(1e-2, LARGEST_TILT / self.grid_step, 100)
        return tilts, np.array([self._moments(float(tilt)).log_mass for tilt in tilts])

    def _tails(self, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each loss x, the sums over l >= x of p(l) and of p(l) exp(x - l)."""
        import scipy.signal  # slow to import

        above = np.cumsum(probs[::-1])[::-1]
        # y[i] = p[i] + exp(-grid step) y[i + 1], from the largest loss down.
        decay = [1.0, -math.exp(-self.grid_step)]
        return above, scipy.signal.lfilter([1.0], decay, probs[::-1])[::-1]

    def _infinite(self) -> float:
        """The probability that any step has an infinite loss."""
        if any(step.infinite >= 1 for step in self.steps):
            return 1.0
        return -math.expm1(sum(step.count * math.log1p(-step.infinite) for step in self.steps))

    def _tilted(self, step: StepLoss, tilt: float) -> tuple[np.ndarray, np.ndarray, float]:
        """The grid points of one step, their tilted probabilities, and its log M(tilt)."""
        points = step.lowest + np.arange(len(step.log_probs))
        exponents = step.log_probs + tilt * (self.grid_step * points)
        log_mass = float(scipy.special.logsumexp(exponents))
        return points, np.exp(exponents - log_mass), log_mass

    def _moments(self, tilt: float) -> Moments:
        if tilt not in self._moments_at:
            log_mass = mean = variance = 0.0
            # Cumulants of independent steps add up.
            for step in self.steps:
                points, probs, log_mass_of_step = self._tilted(step, tilt)
                losses = self.grid_step * points
                # Not `probs @ losses`: for long vectors BLAS starts threads, which cost more than
                # they save, above all on a machine that is busy.
                center = float((probs * losses).sum())
                log_mass += step.count * log_mass_of_step
                mean += step.count * center
                variance += step.count * float((probs * np.square(losses - center)).sum())
            self._moments_at[tilt] = Moments(log_mass, mean, variance)
        return self._moments_at[tilt]

    def _tilt_for_delta(self, log_delta: float) -> float:
        """The tilt whose mean is about the epsilon at this delta.

        Chernoff's bound log delta(epsilon) <= K(t) - t epsilon is tight up to a factor at
        epsilon = K'(t), so solve K(t) - t K'(t) = log delta. Where losses are rare and large,
        K' almost jumps, so the equation must be solved well.
        """
        import scipy.optimize  # slow to import

        def excess(tilt: float) -> float:
            moments = self._moments(tilt)
            return moments.log_mass - tilt * moments.mean - log_delta

        low, high = 0.0, 1.0
        while excess(high) > 0:
            if high * self.grid_step >= LARGEST_TILT:
                return high
            low, high = high, 2 * high
        return float(scipy.optimize.brentq(excess, low, high, xtol=1e-4 * high, rtol=1e-4))

    def _size(self, tilt: float) -> int:
        """The number of grid points of a window."""
        low, high = self._bounds(tilt)
        return high - low

    def _bounds(self, tilt: float) -> tuple[int, int]:
        """The grid points outside of which the tilted sum has negligible mass, by Chernoff."""
        if tilt not in self._bounds_at:
            log_mass, mean, variance = self._moments(tilt)
            scale = max(math.sqrt(variance), self.grid_step)
            reach = {1: math.inf, -1: math.inf}  # above the mean and below it
            for sign in reach:
                for factor in TILT_SHIFTS:
                    # The tilted sum, tilted by a further shift, has K(tilt + shift) - K(tilt).
                    shift = sign * factor / scale
                    grown = self._moments(tilt + shift).log_mass
                    bound = (grown - log_mass - shift * mean - LOG_NEGLIGIBLE) / abs(shift)
                    reach[sign] = min(reach[sign], bound)
            low = math.floor((mean - reach[-1]) / self.grid_step) - 1
            self._bounds_at[tilt] = low, math.ceil((mean + reach[1]) / self.grid_step) + 1
        return self._bounds_at[tilt]

    def _window(self, tilt: float) -> Window:
        """Convolves the tilted steps and undoes the tilt: items 3 and 4 above."""
        import scipy.fft  # slow to import

        low, high = self._bounds(tilt)
        length = scipy.fft.next_fast_len(high - low + 1, real=True)
        spectrum: np.ndarray | float = 1.0
        log_mass = 0.0
        for step in self.steps:
            points, probs, log_mass_of_step = self._tilted(step, tilt)
            log_mass += step.count * log_mass_of_step
            # A grid point modulo the length: the FFT's convolution is circular, and the mass that
            # wraps around is negligible, as it lies outside the window.
            folded = np.bincount(points % length, weights=probs, minlength=length)
            spectrum = spectrum * scipy.fft.rfft(folded) ** step.count
        sums = np.maximum(scipy.fft.irfft(spectrum, length), 0.0)
        points = low + np.arange(length)
        losses = self.grid_step * points
        # Far below the middle the factor may overflow; the sums there are rounding errors.
        exponents = np.minimum(log_mass - tilt * losses, 700.0)
        tilted = sums[points % length]
        return Window(losses, tilted * np.exp(exponents), tilted)


def compositions(
    runs: Sequence[tuple[PrivacyLossDistribution, int]], grid_step: float
) -> list[Composition]:
    """Returns the loss of all steps together, once or once per direction of neighbours.

    `runs` has one distribution per kind of step, all on one grid, and how often that step ran.
    """
    losses = [(grid_losses(one), count) for one, count in runs]
    directions = [Composition([_step_loss(loss[0], n) for loss, n in losses], grid_step)]
    # A symmetric loss is the same object in both directions.
    if any(removed is not added for (removed, added), _ in losses):
        directions.append(Composition([_step_loss(loss[1], n) for loss, n in losses], grid_step))
    return directions


def _step_loss(loss: GridLoss, count: int) -> StepLoss:
    present = np.flatnonzero(loss.probabilities > 0)
    first, last = present[0], present[-1] + 1
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.maximum(loss.probabilities[first:last], 0.0))
    return StepLoss(log_probs, int(loss.lowest + first), loss.infinite, count)


def _between_losses(
    losses: np.ndarray, above: np.ndarray, discounted: np.ndarray, first: int, delta: float
) -> float:
    """The epsilon at `delta`, at most the loss number `first` and above the loss before it.

    There delta(epsilon) = above - exp(epsilon - loss) * discounted, with the tails of that loss.
    """
    inside = 0.0
    if discounted[first] > 0 and above[first] > delta:
        inside = min(math.log((above[first] - delta) / discounted[first]), 0.0)
    return max(float(losses[first]) + inside, 0.0)
