"""Low-rank guide: a normal distribution with a diagonal plus low-rank covariance.

    latents = loc + D noise_1 + B noise_2,   covariance = D**2 + B B^T

D is diagonal and B has `rank` columns, so the cost is linear in the number of latents.

Reference: Ong, Nott and Smith 2018, "Gaussian variational approximation with a factor covariance
structure".
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.vi.guides._base import NormalGuide, Opaque, flat, normal_kl


class LowRank(NormalGuide):
    """Normal latents that are independent except along a few shared directions.

    The parameters are `loc`, a tree like the latents, `raw_scale`, `(latents,)`, whose softplus is
    the diagonal D, and `directions`, the matrix B, `(latents, rank)`.

    Attributes:
        latents: as in `MeanField`.
        rank: number of shared directions.
        initial_scale: as in `MeanField`, before the shared directions are added.

    Raises:
        TypeError: as in `MeanField`, or a rank that is not a whole number.
        ValueError: as in `MeanField`, or a rank below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> guide = LowRank(jnp.zeros(5), rank=2)
        >>> guide.init(jax.random.key(0), jax.random.key(0))["params"]["directions"].shape
        (5, 2)

    Reference: Ong, Nott and Smith 2018, "Gaussian variational approximation with a factor
    covariance structure".
    """

    rank: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        """Checks the rank, then the other arguments."""
        self.rank = _validate.count("rank", self.rank)
        super().__post_init__()

    def setup(self) -> None:
        """Makes the parameters."""
        self.location: Opaque = self._location_param()
        self.raw_scale: Array = self._raw_scale_param("raw_scale")
        shape = (self._size(), self.rank)
        # Random, because B = 0 is a saddle point. Scaled by the number of latents, so that each
        # column starts with a norm of about `initial_scale`.
        stddev = self.initial_scale / math.sqrt(self._size())
        self.directions: Array = self.param(
            "directions", lambda key: stddev * jax.random.normal(key, shape)
        )

    def noise(self, key: PRNGKeyArray) -> Float[Array, " noise"]:
        """See `Guide.noise`."""
        return jax.random.normal(key, (self._size() + self.rank,))

    def transform(self, base_noise: Float[Array, " noise"]) -> PyTree:
        """See `Guide.transform`."""
        loc, unravel = ravel_pytree(self.location.tree)
        own, shared = jnp.split(base_noise, [self._size()])
        return unravel(loc + nn.softplus(self.raw_scale) * own + self.directions @ shared)

    def log_prob(self, latents: PyTree) -> Float[Array, ""]:
        """See `Guide.log_prob`."""
        centered = flat(latents) - flat(self.location.tree)
        scale = nn.softplus(self.raw_scale)
        # The Woodbury identity: only a (rank, rank) matrix is factored.
        scaled, inner = self._scaled_directions(scale)
        projected = jax.scipy.linalg.solve_triangular(
            inner, scaled.T @ (centered / scale), lower=True
        )
        squared_distance = jnp.sum((centered / scale) ** 2) - jnp.sum(projected**2)
        constant = self._size() * math.log(2 * math.pi)
        return -0.5 * (squared_distance + constant) - self._half_log_det()

    def kl(self, scale: float) -> Float[Array, ""]:
        """See `Guide.kl`."""
        variances = nn.softplus(self.raw_scale) ** 2 + jnp.sum(self.directions**2, axis=1)
        return normal_kl(flat(self.location.tree), variances, self._half_log_det(), scale)

    def _half_log_det(self) -> Float[Array, ""]:
        """Half the log determinant of the covariance, by the matrix determinant lemma."""
        scale = nn.softplus(self.raw_scale)
        _, inner = self._scaled_directions(scale)
        return jnp.sum(jnp.log(scale)) + jnp.sum(jnp.log(jnp.diag(inner)))

    def _scaled_directions(self, scale: Float[Array, " latents"]) -> tuple[Array, Array]:
        """Returns D^-1 B, and the Cholesky factor of I + B^T D^-2 B."""
        scaled = self.directions / scale[:, None]
        return scaled, jnp.linalg.cholesky(jnp.eye(self.rank) + scaled.T @ scaled)
