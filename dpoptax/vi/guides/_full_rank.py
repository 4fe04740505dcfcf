"""Full-rank guide: one normal distribution with any covariance.

    latents = loc + L base_noise,   L lower triangular with a positive diagonal

Reference: Kucukelbir et al. 2017, arXiv:1603.00788.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi.guides._base import NormalGuide, Opaque, flat, normal_kl, standard_normal_log_prob


class FullRank(NormalGuide):
    """A normal distribution with any covariance. It has about (latents**2) / 2 parameters.

    The parameters are `loc`, a tree like the latents, and the Cholesky factor of the covariance:
    `raw_diagonal`, `(latents,)`, whose softplus is the diagonal, and `below`, `(latents, latents)`,
    of which only the entries below the diagonal are used.

    Attributes:
        latents: as in `MeanField`.
        initial_scale: as in `MeanField`; the initial covariance is diagonal.

    Raises:
        TypeError: as in `MeanField`.
        ValueError: as in `MeanField`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> guide = FullRank(jnp.zeros(3))
        >>> guide.init(jax.random.key(0), jax.random.key(0))["params"]["below"].shape
        (3, 3)

    Reference: Kucukelbir et al. 2017, arXiv:1603.00788.
    """

    def setup(self) -> None:
        """Makes the parameters."""
        self.location: Opaque = self._location_param()
        self.raw_diagonal: Array = self._raw_scale_param("raw_diagonal")
        # A square matrix, half of which is unused: simpler to index than a packed triangle.
        zeros = jnp.zeros((self._size(), self._size()), jnp.float32)
        self.below: Array = self.param("below", lambda _: zeros)

    def noise(self, key: PRNGKeyArray) -> Float[Array, " latents"]:
        """See `Guide.noise`."""
        return jax.random.normal(key, (self._size(),))

    def transform(self, base_noise: Float[Array, " latents"]) -> PyTree:
        """See `Guide.transform`."""
        loc, unravel = ravel_pytree(self.location.tree)
        return unravel(loc + self._cholesky_factor() @ base_noise)

    def log_prob(self, latents: PyTree) -> Float[Array, ""]:
        """See `Guide.log_prob`."""
        centered = flat(latents) - flat(self.location.tree)
        standardized = jax.scipy.linalg.solve_triangular(
            self._cholesky_factor(), centered, lower=True
        )
        return standard_normal_log_prob(standardized) - self._half_log_det()

    def kl(self, scale: float) -> Float[Array, ""]:
        """See `Guide.kl`."""
        variances = jnp.sum(self._cholesky_factor() ** 2, axis=1)
        return normal_kl(flat(self.location.tree), variances, self._half_log_det(), scale)

    def _cholesky_factor(self) -> Float[Array, "latents latents"]:
        return jnp.tril(self.below, -1) + jnp.diag(nn.softplus(self.raw_diagonal))

    def _half_log_det(self) -> Float[Array, ""]:
        return jnp.sum(jnp.log(nn.softplus(self.raw_diagonal)))
