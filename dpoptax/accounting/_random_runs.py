"""How many runs a private search makes: a random number, drawn once and kept secret."""

import math

import attrs
import dp_accounting
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax import _serialize, _validate
from dpoptax.random._allowed_keys import allowed_key

# The probabilities of all numbers of runs are held at once. Larger means are of no use: epsilon
# grows with the logarithm of the mean.
LARGEST_MEAN = 1000.0
# Beyond, rounding of gamma shows in the mean; and Poisson costs less.
LARGEST_SHAPE = 100.0
# What follows the table of probabilities has a probability of about exp(-45).
TAIL_EXPONENT = 45.0


def _mean(value: float) -> float:
    mean = _validate.positive("mean", value)
    if not 1 <= mean <= LARGEST_MEAN:
        raise ValueError(
            f"mean is the expected number of runs, from 1 to {LARGEST_MEAN:g}; got {mean:g}. Pass "
            "for example 10."
        )
    return mean


def _shape(value: float) -> float:
    shape = _validate.real("shape", value)
    if shape < 0 or LARGEST_SHAPE < shape < math.inf:
        raise ValueError(
            f"shape must be from 0 to {LARGEST_SHAPE:g}, or infinite; got {shape:g}. Pass 1 for a "
            "geometric number of runs, or math.inf for a Poisson number."
        )
    return shape


@attrs.frozen
class RandomRuns:
    """The distribution of the number of runs of a search that returns its best run.

    A search that always makes ten runs, and returns the best one, can cost ten times epsilon. If
    the number of runs is random, with a long tail, it costs two to three times epsilon
    (`accounting.tuned`). With `shape` eta and halting probability gamma, k runs have probability

        (1 - gamma)^k / (gamma^-eta - 1) * prod_(l < k) (l + eta) / (l + 1),    k >= 1,

    the truncated negative binomial. A small shape costs less, and makes very few or very many runs
    more likely.

    Attributes:
        mean: the expected number of runs, from 1 to 1000.
        shape: 0 for the logarithmic distribution, 1 for the geometric one, `math.inf` for the
            Poisson distribution. The last one can be 0: then release something that does not depend
            on the data, such as the initial parameters.

    Raises:
        TypeError: an argument is not a number.
        ValueError: a number is out of range.

    Example:
        >>> import jax
        >>> runs = RandomRuns(mean=10)
        >>> runs.draw(jax.random.key(2))
        10

    Reference: Papernot and Steinke 2022, arXiv:2110.03620, definition 1.
    """

    mean: float = attrs.field(converter=_mean)
    shape: float = attrs.field(default=1.0, converter=_shape)

    @property
    def halting_probability(self) -> float:
        """Gamma of the negative binomial; 1 if there is exactly one run, 0 for Poisson."""
        if math.isinf(self.shape):
            return 0.0
        if self.mean == 1:
            return 1.0
        import scipy.optimize  # slow to import

        def excess(log_gamma: float) -> float:
            return _log_mean(log_gamma, self.shape) - math.log(self.mean)

        # The mean falls from infinity to 1 as gamma grows from 0 to 1.
        highest = -1e-12
        log_gamma = (
            highest if excess(highest) >= 0 else scipy.optimize.brentq(excess, -400.0, highest)
        )
        return math.exp(log_gamma)

    def draw(self, key: PRNGKeyArray) -> int:
        """Returns the number of runs. Keep it secret, and use `key` for nothing else."""
        bits = np.asarray(jax.random.bits(allowed_key("key", key), (2,), np.uint32), np.uint64)
        uniform = float((bits[0] << np.uint64(32) | bits[1]) >> np.uint64(11)) * 2.0**-53
        numbers, probabilities = self._table()
        place = int(np.searchsorted(np.cumsum(probabilities), uniform, side="right"))
        return int(numbers[min(place, len(numbers) - 1)])

    def event(self, event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
        """Returns dp-accounting's event of a search over runs that each cost `event`."""
        return dp_accounting.dp_event.RepeatAndSelectDpEvent(event, self.mean, self.shape)

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """The possible numbers of runs but for a negligible tail, and their probabilities."""
        import scipy.special  # slow to import

        if self.mean == 1 and math.isfinite(self.shape):
            return np.ones(1, int), np.ones(1)
        gamma, shape = self.halting_probability, self.shape
        size = 10 * self.mean + 50
        if math.isinf(shape):
            numbers = np.arange(math.ceil(size))
            logs = numbers * math.log(self.mean) - scipy.special.gammaln(numbers + 1.0)
        else:
            numbers = np.arange(1, math.ceil(size - TAIL_EXPONENT / math.log1p(-gamma)))
            logs = numbers * math.log1p(-gamma) - scipy.special.gammaln(numbers + 1.0)
            # Gamma(k + eta) up to a constant; the logarithmic distribution is the limit at zero.
            logs += scipy.special.gammaln(numbers + shape)
        probabilities = np.exp(logs - logs.max())
        return numbers, probabilities / probabilities.sum()


def _log_mean(log_gamma: float, shape: float) -> float:
    """The logarithm of the mean: eta (1/gamma - 1) / (1 - gamma^eta), or its limit at eta = 0."""
    # (1 - gamma) / gamma, and (1 - gamma^eta) / eta without a division by zero.
    odds = math.log(-math.expm1(log_gamma)) - log_gamma
    power = -math.expm1(shape * log_gamma) / shape if shape > 1e-9 else -log_gamma
    return odds - math.log(power)


_serialize.register(RandomRuns)
