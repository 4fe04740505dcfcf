"""Linear regression from noisy second moments of features and labels."""

import functools
import math
import warnings
from typing import NamedTuple

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax.accounting import Ledger
from dpoptax.mechanisms import Gaussian, Mechanism
from dpoptax.random._derive import fingerprint
from dpoptax.vi.conjugate import _hmc
from dpoptax.vi.conjugate._moments import (
    Factor,
    Hyperparameters,
    draw_parameters,
    log_evidence,
    log_features_prior,
    multiply,
)
from dpoptax.vi.conjugate._release import (
    NoisyStatistics,
    charge_and_release,
    noisy_sum_of_rows,
)

# What chains that have met should stay below (Vehtari et al. 2021 say 1.01 for published results).
LARGEST_R_HAT = 1.05


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
    y = x'β and adds no bias. A larger y is clipped, which does: choose `y_bound` so that it is rare.

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

    num_features: int = attrs.field(
        converter=functools.partial(_validate.count, "num_features")
    )
    x_bound: float = attrs.field(converter=functools.partial(_validate.positive, "x_bound"))
    y_bound: float = attrs.field(converter=functools.partial(_validate.positive, "y_bound"))
    coefficient_scale: float = attrs.field(default=10.0, converter=functools.partial(_validate.positive, "coefficient_scale"))
    variance_shape: float = attrs.field(default=1.0, converter=functools.partial(_validate.positive, "variance_shape"))
    variance_scale: float = attrs.field(converter=functools.partial(_validate.positive, "variance_scale"))

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
        draws, r_hat = _draw(
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
        return _upper(rows[:, :, None] * rows[:, None, :])

    def _prior(self) -> Hyperparameters:
        return Hyperparameters(
            precision=1 / (self.coefficient_scale * self.x_bound) ** 2,
            shape=self.variance_shape,
            rate=self.variance_scale / self.y_bound**2,
            spread=0.1 / self.num_features,
        )


def warn_of_r_hat(r_hat: Float[Array, ""]) -> None:
    """Warns if chains did not agree; says nothing about draws that are traced."""
    if not isinstance(r_hat, jax.core.Tracer) and float(r_hat) > LARGEST_R_HAT:
        warnings.warn(
            f"the chains of the posterior did not agree: split R-hat is {float(r_hat):.2f}, and "
            f"should be below {LARGEST_R_HAT}. Draw more samples.",
            RuntimeWarning,
            stacklevel=3,
        )


def _upper(matrices: Float[Array, "*batch n n"]) -> Float[Array, "*batch entries"]:
    rows, columns = np.triu_indices(matrices.shape[-1])
    factors = np.where(rows == columns, 1.0, math.sqrt(2)).astype(np.float32)
    return matrices[..., rows, columns] * factors


def _matrix(entries: Float[Array, " entries"], size: int) -> Float[Array, "n n"]:
    """The symmetric matrix of `_upper`."""
    rows, columns = np.triu_indices(size)
    factors = np.where(rows == columns, 1.0, math.sqrt(0.5)).astype(np.float32)
    upper = jnp.zeros((size, size)).at[rows, columns].set(entries * factors)
    return jnp.where(np.tri(size, k=-1, dtype=bool), upper.T, upper)


class _Noisy(NamedTuple):
    """What the density of the moments depends on."""

    entries: Float[Array, " entries"]
    noise_stddev: Float[Array, ""]
    prior: Hyperparameters
    num_examples: Float[Array, ""]


def _draw(
    entries: Float[Array, " entries"],
    noise_stddev: float | Array,
    key: PRNGKeyArray,
    prior: Hyperparameters,
    num_examples: int,
    num_samples: int,
) -> tuple[tuple[Array, Array], Array]:
    """Draws coefficients and variances, in units of the bounds; also returns R-hat."""
    numbers = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), tuple(prior))
    noisy = _Noisy(
        jnp.asarray(entries),
        jnp.asarray(noise_stddev, jnp.float32),
        Hyperparameters(*numbers),
        jnp.asarray(num_examples, jnp.float32),
    )
    chain_key, parameter_key = jax.random.split(key)
    draws = _hmc.sample(_log_density, noisy, *_start(noisy), chain_key, num_samples)
    return _parameters(draws.positions, noisy, parameter_key), draws.r_hat


def _factor_of(point: Float[Array, " dim"], num_examples: Array) -> Factor:
    """The factor L from the logarithms of its diagonal and what lies below."""
    size = _size(len(point))
    lower = jnp.diag(jnp.exp(point[:size])).at[np.tril_indices(size, k=-1)].set(point[size:])
    return Factor(lower[:-1, :-1], lower[-1, :-1], point[size - 1], num_examples)


def _moments(point: Float[Array, " dim"], num_examples: Array) -> Float[Array, " dim"]:
    """The entries of M as they are released."""
    factor = _factor_of(point, num_examples)
    top = jnp.concatenate([factor.second_moments, factor.cross_moments[:, None]], axis=1)
    last = jnp.append(factor.cross_moments, factor.squares)
    return _upper(jnp.concatenate([top, last[None]]))


def _log_density(point: Float[Array, " dim"], noisy: _Noisy) -> Float[Array, ""]:
    size = _size(len(point))
    factor = _factor_of(point, noisy.num_examples)
    off = (noisy.entries - _moments(point, noisy.num_examples)) / noisy.noise_stddev
    # The last term is the Jacobian of M as a function of the point.
    powers = np.arange(size + 1, 1, -1, dtype=np.float32)
    return (
        -jnp.sum(off**2) / 2
        + log_evidence(factor, noisy.prior)
        + log_features_prior(factor, noisy.prior)
        + jnp.sum(powers * point[:size])
    )


@jax.jit
def _start(noisy: _Noisy) -> tuple[Float[Array, " dim"], Float[Array, "dim dim"]]:
    """A point near the noisy moments, and the root of its covariance by the noise alone."""
    size = _size(len(noisy.entries))
    values, vectors = jnp.linalg.eigh(_matrix(noisy.entries, size))
    # The noise may have made the matrix indefinite.
    smallest = noisy.noise_stddev + 1e-6 * noisy.num_examples
    values = jnp.maximum(values, smallest) / noisy.num_examples
    lower = jnp.linalg.cholesky(multiply(vectors * values, vectors.T))
    point = jnp.append(jnp.log(jnp.diagonal(lower)), lower[np.tril_indices(size, k=-1)])
    slope = jax.jacfwd(_moments)(point, noisy.num_examples) / noisy.noise_stddev
    information = multiply(slope.T, slope)
    information += 1e-4 * jnp.diag(jnp.diagonal(information)) + jnp.eye(len(point))
    root = jnp.linalg.inv(jnp.linalg.cholesky(information)).T
    return point, root


@jax.jit
def _parameters(
    points: Float[Array, "draws dim"], noisy: _Noisy, key: PRNGKeyArray
) -> tuple[Array, Array]:
    def draw(point: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        return draw_parameters(_factor_of(point, noisy.num_examples), noisy.prior, key)

    return jax.vmap(draw)(points, jax.random.split(key, len(points)))


def _size(num_entries: int) -> int:
    """The side of a symmetric matrix with this many entries in its upper triangle."""
    return (math.isqrt(8 * num_entries + 1) - 1) // 2
