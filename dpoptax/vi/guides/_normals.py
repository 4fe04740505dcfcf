"""Latents in, a normal law over them out: independent, of any covariance, or in between.

Reference: Kucukelbir et al. 2017, arXiv:1603.00788; Ong, Nott and Smith 2018 for low rank.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from dpoptax import _validate
from dpoptax.vi.guides._base import Guide, arguments


class MeanField(Guide):
    """Independent normal latents; made by `mean_field`."""

    def setup(self) -> None:
        """Names the parameters: the location, and the inverse softplus of the scale."""
        self.located = self._located()
        self.raw_scale = self._raw("raw_scale", (self.start.size,))

    def transform(self, eta: Array) -> PyTree:
        """See `Guide.transform`."""
        loc, unravel = ravel_pytree(self.located.latents)
        return unravel(loc + nn.softplus(self.raw_scale) * eta)

    def log_prob(self, theta: PyTree) -> Float[Array, ""]:
        """See `Guide.log_prob`."""
        scale = nn.softplus(self.raw_scale)
        standard = (ravel_pytree(theta)[0] - ravel_pytree(self.located.latents)[0]) / scale
        return _standard_log_prob(standard) - jnp.sum(jnp.log(scale))

    def kl(self, scale: float) -> Float[Array, ""]:
        """See `Guide.kl`."""
        spread = nn.softplus(self.raw_scale)
        return _kl(
            ravel_pytree(self.located.latents)[0], spread**2, jnp.sum(jnp.log(spread)), scale
        )


class FullRank(Guide):
    """One normal distribution of any covariance; made by `full_rank`."""

    def setup(self) -> None:
        """Names the parameters: the location, and a triangular factor of the covariance."""
        self.located = self._located()
        self.raw_diagonal = self._raw("raw_diagonal", (self.start.size,))
        zeros = jnp.zeros((self.start.size, self.start.size), jnp.float32)
        self.below = self.param("below", lambda _: zeros)

    def transform(self, eta: Array) -> PyTree:
        """See `Guide.transform`."""
        loc, unravel = ravel_pytree(self.located.latents)
        return unravel(loc + self._factor() @ eta)

    def log_prob(self, theta: PyTree) -> Float[Array, ""]:
        """See `Guide.log_prob`."""
        away = ravel_pytree(theta)[0] - ravel_pytree(self.located.latents)[0]
        standard = jax.scipy.linalg.solve_triangular(self._factor(), away, lower=True)
        return _standard_log_prob(standard) - jnp.sum(jnp.log(nn.softplus(self.raw_diagonal)))

    def kl(self, scale: float) -> Float[Array, ""]:
        """See `Guide.kl`."""
        variances = jnp.sum(self._factor() ** 2, axis=1)
        log_volume = jnp.sum(jnp.log(nn.softplus(self.raw_diagonal)))
        return _kl(ravel_pytree(self.located.latents)[0], variances, log_volume, scale)

    def _factor(self) -> Array:
        return jnp.tril(self.below, -1) + jnp.diag(nn.softplus(self.raw_diagonal))


class LowRank(Guide):
    """Independent normals, and a few directions in which they move together; by `low_rank`."""

    rank: int = 1

    def setup(self) -> None:
        """Names the parameters: the location, the scale, and the directions."""
        self.located = self._located()
        self.raw_scale = self._raw("raw_scale", (self.start.size,))
        shape = (self.start.size, self.rank)
        spread = self.initial_scale / math.sqrt(self.start.size)
        self.directions = self.param(
            "directions", lambda key: spread * jax.random.normal(key, shape)
        )

    def noise(self, key: PRNGKeyArray) -> Array:
        """See `Guide.noise`."""
        return jax.random.normal(key, (self.start.size + self.rank,))

    def transform(self, eta: Array) -> PyTree:
        """See `Guide.transform`."""
        loc, unravel = ravel_pytree(self.located.latents)
        own, shared = jnp.split(eta, [self.start.size])
        return unravel(loc + nn.softplus(self.raw_scale) * own + self.directions @ shared)

    def log_prob(self, theta: PyTree) -> Float[Array, ""]:
        """See `Guide.log_prob`."""
        away = ravel_pytree(theta)[0] - ravel_pytree(self.located.latents)[0]
        scale = nn.softplus(self.raw_scale)
        # Woodbury: only a matrix of the rank is factored.
        scaled = self.directions / scale[:, None]
        inner = jnp.linalg.cholesky(jnp.eye(self.rank) + scaled.T @ scaled)
        along = jax.scipy.linalg.solve_triangular(inner, scaled.T @ (away / scale), lower=True)
        distance = jnp.sum((away / scale) ** 2) - jnp.sum(along**2)
        constant = self.start.size * math.log(2 * math.pi)
        return -0.5 * (distance + constant) - self._log_volume()

    def kl(self, scale: float) -> Float[Array, ""]:
        """See `Guide.kl`."""
        variances = nn.softplus(self.raw_scale) ** 2 + jnp.sum(self.directions**2, axis=1)
        return _kl(ravel_pytree(self.located.latents)[0], variances, self._log_volume(), scale)

    def _log_volume(self) -> Array:
        """Half the log determinant of the covariance."""
        scale = nn.softplus(self.raw_scale)
        scaled = self.directions / scale[:, None]
        inner = jnp.linalg.cholesky(jnp.eye(self.rank) + scaled.T @ scaled)
        return jnp.sum(jnp.log(scale)) + jnp.sum(jnp.log(jnp.diag(inner)))


def mean_field(latents: PyTree, *, initial_scale: float = 0.1) -> MeanField:
    """Makes a guide of independent normal latents.

    Args:
        latents: a tree of arrays, the initial location; it must not depend on private data.
        initial_scale: of every latent.

    Returns:
        A Flax module with the parameters `loc`, a tree like the latents, and `raw_scale`,
        `(latents,)`, whose softplus is the scale.

    Raises:
        TypeError: latents that are not floating-point.
        ValueError: no latents, or a scale that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> guide = mean_field({"w": jnp.zeros(3), "b": jnp.zeros(())})
        >>> psi = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> theta = guide.apply({"params": psi}, jax.random.key(1))
        >>> theta["w"].shape, bool(guide.apply({"params": psi}, 1.0, method="kl") > 0)
        ((3,), True)

    Reference: Kucukelbir et al. 2017, arXiv:1603.00788.
    """
    return MeanField(**arguments(latents, initial_scale))


def full_rank(latents: PyTree, *, initial_scale: float = 0.1) -> FullRank:
    """Makes a guide with every correlation; its parameters grow with the square of the latents.

    Args:
        latents: as in `mean_field`.
        initial_scale: as in `mean_field`.

    Returns:
        A Flax module with `loc`, `raw_diagonal` and `below`, the parts of a Cholesky factor.

    Raises:
        TypeError: as in `mean_field`.
        ValueError: as in `mean_field`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> guide = full_rank(jnp.zeros(3))
        >>> psi = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> psi["below"].shape
        (3, 3)

    Reference: Kucukelbir et al. 2017, arXiv:1603.00788.
    """
    return FullRank(**arguments(latents, initial_scale))


def low_rank(latents: PyTree, *, rank: int, initial_scale: float = 0.1) -> LowRank:
    """Makes a guide of independent latents that also move together in a few directions.

    Args:
        latents: as in `mean_field`.
        rank: how many directions.
        initial_scale: as in `mean_field`.

    Returns:
        A Flax module with `loc`, `raw_scale` and `directions`, `(latents, rank)`.

    Raises:
        TypeError: as in `mean_field`, or a rank that is not whole.
        ValueError: as in `mean_field`, or a rank below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> guide = low_rank(jnp.zeros(5), rank=2)
        >>> guide.init(jax.random.key(0), jax.random.key(0))["params"]["directions"].shape
        (5, 2)

    Reference: Ong, Nott and Smith 2018, "Gaussian variational approximation with a factor
    covariance structure".
    """
    return LowRank(rank=_validate.count("rank", rank), **arguments(latents, initial_scale))


def _standard_log_prob(standard: Array) -> Array:
    return -0.5 * (jnp.sum(standard**2) + standard.size * math.log(2 * math.pi))


def _kl(loc: Array, variances: Array, log_volume: Array, scale: float) -> Array:
    """KL(N(loc, covariance) || N(0, scale**2 I)) by the diagonal and half the log determinant."""
    ratio = jnp.sum(loc**2 + variances) / scale**2
    return 0.5 * (ratio - loc.size) + loc.size * math.log(scale) - log_volume
