"""Linear regression from noisy second moments of features and labels."""

import functools

import attrs
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax.accounting import Ledger
from dpoptax.mechanisms import Gaussian, Mechanism
from dpoptax.random._derive import fingerprint
from dpoptax.vi.conjugate import _regression_posterior
from dpoptax.vi.conjugate._fields import is_positive, number
from dpoptax.vi.conjugate._hmc import warn_of_r_hat
from dpoptax.vi.conjugate._moments import Hyperparameters
from dpoptax.vi.conjugate._release import (
    NoisyStatistics,
    charge_and_release,
    noisy_sum_of_rows,
    refuse_other_than_numbers,
)


def _num_features(value: int) -> int:
    return _validate.count("num_features", value)


@attrs.frozen(kw_only=True)
class LinearRegression:
    """Bayesian linear regression from private second moments, with a prior that is conjugate.

        y = x'β + σ ε,  β | σ² ~ N(0, coefficient_scale² σ² I),
        σ² ~ InverseGamma(variance_shape, variance_scale)

    There is no intercept: add a column of ones to x, and count it in `x_bound`.

    `release` divides x and y by their bounds and releases M = Σ z z' with z = (x, y). Its entries
    above the diagonal are multiplied by √2, so that the norm of what an example adds is the
    Frobenius norm of z z', which is ‖z‖² ≤ 2. So one example more moves the release by 2 at most,
    and the noise of each number is N(0, (2 noise_multiplier)²). One example that replaces another
    moves it by ‖z z' - w w'‖ ≤ √(‖z‖⁴ + ‖w‖⁴) ≤ √8, because (z'w)² ≥ 0.

    Bounds are enforced. A row with a longer x is scaled down together with its y, which keeps
    y = x'β and adds no bias. A larger y is clipped, which adds one: choose `y_bound` so that this
    is rare.

    `posterior` knows the noise. Given M, the posterior has a closed form. M given its noisy release
    is sampled by Hamiltonian Monte Carlo, under the prior of features with a normal distribution of
    unknown covariance, which matters little for many examples. No part rests on the central limit
    theorem.

    Attributes:
        num_features: the length of x.
        x_bound: bound on the L2 norm of x; a public number.
        y_bound: bound on |y|; a public number.
        coefficient_scale: prior standard deviation of a coefficient, in units of σ.
        variance_shape: of the prior of σ².
        variance_scale: of the prior of σ²; (y_bound / 10)² by default.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Example:
        >>> import dpoptax, jax, jax.numpy as jnp
        >>> x = jax.random.uniform(jax.random.key(0), (500, 2), minval=-1.0)
        >>> y = x @ jnp.array([1.0, -1.0]) + 0.1 * jax.random.normal(jax.random.key(1), (500,))
        >>> plan = dpoptax.Plan.calibrate(
        ...     num_examples=500, expected_batch_size=500, clip=1.0, num_steps=1, epsilon=2.0,
        ...     delta=1e-4,
        ... )
        >>> ledger = plan.ledger()
        >>> model = LinearRegression(num_features=2, x_bound=1.5, y_bound=2.0)
        >>> noisy = model.release((x, y), noise_multiplier=plan.noise_multiplier, ledger=ledger)
        >>> draws = model.posterior(noisy, 100, key=jax.random.key(2))
        >>> draws["coefficients"].shape, draws["variance"].shape, ledger.epsilon() <= 2
        ((100, 2), (100,), True)

    Reference: Bernstein and Sheldon 2019, arXiv:1910.11517, for the idea; the module
    `dpoptax/vi/conjugate/_moments.py` has the density.
    """

    num_features: int = attrs.field(converter=_num_features)
    x_bound: float = attrs.field(converter=number, validator=is_positive)
    y_bound: float = attrs.field(converter=number, validator=is_positive)
    coefficient_scale: float = attrs.field(default=10.0, converter=number, validator=is_positive)
    variance_shape: float = attrs.field(default=1.0, converter=number, validator=is_positive)
    variance_scale: float = attrs.field(converter=number, validator=is_positive)

    @variance_scale.default
    def _default_variance_scale(self) -> float:
        return (self.y_bound / 10) ** 2

    def release(
        self,
        data: tuple[Float[Array, "examples features"], Float[Array, " examples"]],
        *,
        noise_multiplier: float,
        ledger: Ledger,
        key: PRNGKeyArray | None = None,
        mechanism: Mechanism = Gaussian(),
    ) -> NoisyStatistics:
        """Releases the second moments with noise, and charges the ledger before.

        Args:
            data: the features and the labels. A row that is not finite is left out.
            noise_multiplier: standard deviation of the noise divided by the sensitivity.
            ledger: is charged one Gaussian mechanism with this noise multiplier.
            key: for this release and nothing else; a new secret key by default.
            mechanism: how the noise is drawn.

        Returns:
            The upper triangle of M by rows, in units of the bounds and with the factor √2.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a shape or a number is wrong, or the values are traced.
        """
        refuse_other_than_numbers(tuple(data))
        x, y = (jnp.asarray(part, jnp.float32) for part in data)
        if x.ndim != 2 or x.shape[1] != self.num_features or y.shape != x.shape[:1]:
            raise ValueError(
                f"data must be x of shape (examples, {self.num_features}) and y of shape "
                f"(examples,); got {x.shape} and {y.shape}."
            )
        if len(x) <= self.num_features:
            raise ValueError(
                f"the model needs more examples than features; got {len(x)} and "
                f"{self.num_features}."
            )
        return charge_and_release(
            (x, y),
            functools.partial(self._noisy_sum, mechanism=mechanism),
            noise_multiplier=noise_multiplier,
            ledger=ledger,
            key=key,
            program=fingerprint(self, mechanism),
        )

    def posterior(
        self, noisy: NoisyStatistics, num_samples: int = 1000, *, key: PRNGKeyArray
    ) -> dict[str, Float[Array, "..."]]:
        """Draws from the posterior given the release. This is post-processing and costs nothing.

        Args:
            noisy: what `release` returned.
            num_samples: how many draws.
            key: for these draws; nothing rests on its secrecy.

        Returns:
            `coefficients`, `(num_samples, num_features)`, and `variance`, `(num_samples,)`.

        Raises:
            ValueError: the release is of another model.

        Warns:
            RuntimeWarning: the chains did not agree, so the draws are not to be trusted.
        """
        num_samples = _validate.count("num_samples", num_samples)
        key = _validate.typed_key("key", key)
        size = (self.num_features + 1) * (self.num_features + 2) // 2
        if np.shape(noisy.values) != (size,):
            raise ValueError(
                f"a release of this model has {size} numbers; got the shape "
                f"{np.shape(noisy.values)}. Pass what release of the same model returned."
            )
        draws, r_hat = _regression_posterior.draw(
            noisy.values, noisy.noise_stddev, key, self._prior(), noisy.num_examples, num_samples
        )
        warn_of_r_hat(r_hat)
        return {
            "coefficients": draws[0] * (self.y_bound / self.x_bound),
            "variance": draws[1] * self.y_bound**2,
        }

    def _noisy_sum(
        self,
        key: PRNGKeyArray,
        data: tuple[Array, Array],
        noise_multiplier: float,
        mechanism: Mechanism = Gaussian(),
    ) -> tuple[Float[Array, " statistics"], float]:
        rows = self._statistics(*data)
        return noisy_sum_of_rows(key, rows, 2.0, noise_multiplier, mechanism)

    def _statistics(self, x: Array, y: Array) -> Float[Array, "examples statistics"]:
        """What each example adds: the upper triangle of z z', off the diagonal times √2."""
        x, y = x / self.x_bound, y / self.y_bound
        # Both get the same factor, which keeps y = x'β.
        factor = 1 / jnp.maximum(jnp.linalg.norm(x, axis=1), 1)
        x, y = x * factor[:, None], jnp.clip(y * factor, -1, 1)
        rows = jnp.concatenate([x, y[:, None]], axis=1)
        return _regression_posterior.upper(rows[:, :, None] * rows[:, None, :])

    def _prior(self) -> Hyperparameters:
        return Hyperparameters(
            precision=1 / (self.coefficient_scale * self.x_bound) ** 2,
            shape=self.variance_shape,
            rate=self.variance_scale / self.y_bound**2,
            spread=0.1 / self.num_features,
        )
