"""Mean and variance of a normal distribution, from two noisy sums."""

import functools
import math

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax.accounting import Ledger
from dpoptax.mechanisms import Gaussian, Mechanism
from dpoptax.random._derive import fingerprint
from dpoptax.vi.conjugate import _noisy_posterior
from dpoptax.vi.conjugate._fields import is_positive, number
from dpoptax.vi.conjugate._hmc import warn_of_r_hat
from dpoptax.vi.conjugate._moments import (
    Factor,
    Hyperparameters,
    log_evidence,
)
from dpoptax.vi.conjugate._release import (
    NoisyStatistics,
    charge_and_release,
    noisy_sum_of_rows,
    refuse_other_than_numbers,
)

# The largest norm of (v, v² - 1/2) for |v| <= 1.
SENSITIVITY = math.sqrt(5) / 2


@attrs.frozen(kw_only=True)
class NormalMeanVariance:
    """Mean and variance of a normal distribution from private sums, with a conjugate prior.

        x ~ N(μ, σ²),  μ | σ² ~ N((lower + upper) / 2, mean_scale² σ²),
        σ² ~ InverseGamma(variance_shape, variance_scale)

    With v = (2 x - lower - upper) / (upper - lower) in [-1, 1], `release` releases the sums of v
    and of v² - 1/2. The norm of what an example adds is at most √(1 + 1/4), which it reaches at the
    ends: v² + (v² - 1/2)² = v⁴ + 1/4. One example that replaces another moves the sums by 2 at
    most: with s = v + w and |v - w| ≤ 2 - |s|, the square of the move is
    (v - w)² (1 + s²) ≤ (2 - |s|)² (1 + s²), which falls in |s|, from 4.

    Numbers outside of the range are clipped to it, which adds a bias: choose a range that holds
    almost all of them.

    Attributes:
        lower: the lower end of the range; a public number.
        upper: the upper end.
        mean_scale: prior standard deviation of the mean, in units of σ.
        variance_shape: of the prior of σ².
        variance_scale: of the prior of σ²; ((upper - lower) / 10)² by default.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Example:
        >>> import dpoptax, jax
        >>> x = 3 + jax.random.normal(jax.random.key(0), (500,))
        >>> sampler = dpoptax.samplers.Poisson(500, 500)
        >>> ledger = dpoptax.accounting.Ledger(sampler, clip=1.0, delta=1e-4)
        >>> model = NormalMeanVariance(lower=-5.0, upper=10.0)
        >>> noisy = model.release(x, noise_multiplier=2.0, ledger=ledger)
        >>> draws = model.posterior(noisy, 200, key=jax.random.key(1))
        >>> 2.5 < draws["mean"].mean() < 3.5
        Array(True, dtype=bool)

    Reference: Bernstein and Sheldon 2018, arXiv:1809.02188, for posteriors that know the noise.
    """

    lower: float = attrs.field(converter=number)
    upper: float = attrs.field(converter=number)
    mean_scale: float = attrs.field(default=10.0, converter=number, validator=is_positive)
    variance_shape: float = attrs.field(default=1.0, converter=number, validator=is_positive)
    variance_scale: float = attrs.field(converter=number, validator=is_positive)

    @variance_scale.default
    def _default_variance_scale(self) -> float:
        # An empty range is refused below.
        return ((self.upper - self.lower) / 10) ** 2 or 1.0

    def __attrs_post_init__(self) -> None:
        """Refuses an empty range."""
        if not self.lower < self.upper:
            raise ValueError(
                f"lower must be below upper; got {self.lower:g} and {self.upper:g}. Pass a public "
                "range that holds almost all numbers."
            )

    def release(
        self,
        data: Float[Array, " examples"],
        *,
        noise_multiplier: float,
        ledger: Ledger,
        key: PRNGKeyArray | None = None,
        mechanism: Mechanism = Gaussian(),
    ) -> NoisyStatistics:
        """Releases the two sums with noise, and charges the ledger before.

        Args:
            data: one number for each example. NaN is left out.
            noise_multiplier: standard deviation of the noise divided by the sensitivity.
            ledger: is charged one Gaussian mechanism with this noise multiplier.
            key: for this release and nothing else; a new secret key by default.
            mechanism: how the noise is drawn.

        Returns:
            The sums of v and of v² - 1/2.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a shape or a number is wrong, or the values are traced.
        """
        refuse_other_than_numbers(data)
        numbers = jnp.asarray(data, jnp.float32)
        if numbers.ndim != 1 or len(numbers) < 2:
            raise ValueError(
                f"data must have the shape (examples,), two or more; got {numbers.shape}."
            )
        return charge_and_release(
            numbers,
            functools.partial(self._noisy_sum, mechanism=mechanism),
            noise_multiplier=noise_multiplier,
            ledger=ledger,
            key=key,
            program=fingerprint(self, mechanism),
        )

    def posterior(
        self, noisy: NoisyStatistics, num_samples: int = 1000, *, key: PRNGKeyArray
    ) -> dict[str, Float[Array, " draws"]]:
        """Draws from the posterior given the release. This is post-processing and costs nothing.

        Args:
            noisy: what `release` returned.
            num_samples: how many draws.
            key: for these draws; nothing rests on its secrecy.

        Returns:
            `mean` and `variance`, each `(num_samples,)`.

        Raises:
            ValueError: the release is of another model.

        Warns:
            RuntimeWarning: the chains did not agree, so the draws are not to be trusted.
        """
        num_samples = _validate.count("num_samples", num_samples)
        key = _validate.typed_key("key", key)
        if np.shape(noisy.values) != (2,):
            raise ValueError(
                f"a release of this model has 2 numbers; got the shape {np.shape(noisy.values)}. "
                "Pass what release of the same model returned."
            )
        draws, r_hat = _draw(
            noisy.values, noisy.noise_stddev, key, self._prior(), noisy.num_examples, num_samples
        )
        warn_of_r_hat(r_hat)
        half = (self.upper - self.lower) / 2
        return {
            "mean": draws[0][:, 0] * half + (self.lower + self.upper) / 2,
            "variance": draws[1] * half**2,
        }

    def _noisy_sum(
        self,
        key: PRNGKeyArray,
        data: Array,
        noise_multiplier: float,
        mechanism: Mechanism = Gaussian(),
    ) -> tuple[Float[Array, "2"], float]:
        rows = self._statistics(data)
        return noisy_sum_of_rows(key, rows, SENSITIVITY, noise_multiplier, mechanism)

    def _statistics(self, data: Array) -> Float[Array, "examples 2"]:
        middle, half = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        v = jnp.clip((data - middle) / half, -1, 1)
        return jnp.stack([v, v**2 - 0.5], axis=1)

    def _prior(self) -> Hyperparameters:
        half = (self.upper - self.lower) / 2
        return Hyperparameters(
            precision=1 / self.mean_scale**2,
            shape=self.variance_shape,
            rate=self.variance_scale / half**2,
            spread=1.0,  # not used: the only feature is the constant 1
        )


def _factor_of(point: Float[Array, "2"], num_examples: Array) -> Factor:
    """A regression on the constant 1: X'X is the number of examples, which has no noise."""
    return Factor(jnp.ones((1, 1)), point[:1], point[1], num_examples)


def _log_density(point: Float[Array, "2"], noisy: _noisy_posterior.Noisy) -> Float[Array, ""]:
    factor = _factor_of(point, noisy.num_examples)
    sums = jnp.append(factor.cross_moments, factor.squares - noisy.num_examples / 2)
    off = (noisy.values - sums) / noisy.noise_stddev
    # The last term is the Jacobian of the residual sum of squares.
    return -jnp.sum(off**2) / 2 + log_evidence(factor, noisy.prior) + 2 * point[1]


@jax.jit
def _start(noisy: _noisy_posterior.Noisy) -> tuple[Float[Array, "2"], Float[Array, "2 2"]]:
    """A point near the noisy sums, and the scale of the noise there."""
    noise = noisy.noise_stddev / noisy.num_examples
    mean, square = noisy.values / noisy.num_examples
    spread = jnp.maximum(square + 0.5 - mean**2, noise)
    scale = jnp.diag(jnp.minimum(jnp.stack([noise, noise / spread]), 1.0))
    return jnp.stack([mean, jnp.log(spread) / 2]), scale


_draw = functools.partial(
    _noisy_posterior.draw, _noisy_posterior.Statistics(_log_density, _start, _factor_of)
)
