"""Mean-field guide: independent normal latents.

    latents = loc + softplus(raw_scale) * base_noise

Reference: Kucukelbir et al. 2017, arXiv:1603.00788.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi.guides._base import NormalGuide, Opaque, flat, normal_kl, standard_normal_log_prob


class MeanField(NormalGuide):
    """Independent normal latents.

    The parameters are `loc`, a tree like the latents, and `raw_scale`, `(latents,)`, whose softplus
    is the standard deviation.

    Attributes:
        latents: a tree of arrays, the initial location. It must not depend on private data.
        initial_scale: initial standard deviation of every latent.

    Raises:
        TypeError: latents that are not floating-point.
        ValueError: no latents, or a scale that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> guide = MeanField({"w": jnp.zeros(3), "b": jnp.zeros(())})
        >>> guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> latents = guide.apply({"params": guide_params}, jax.random.key(1))
        >>> latents["w"].shape, bool(guide.apply({"params": guide_params}, 1.0, method="kl") > 0)
        ((3,), True)

    Reference: Kucukelbir et al. 2017, arXiv:1603.00788.
    """

    def setup(self) -> None:
        """Makes the parameters."""
        self.location: Opaque = self._location_param()
        self.raw_scale: Array = self._raw_scale_param("raw_scale")

    def noise(self, key: PRNGKeyArray) -> Float[Array, " latents"]:
        """See `Guide.noise`."""
        return jax.random.normal(key, (self._size(),))

    def transform(self, base_noise: Float[Array, " latents"]) -> PyTree:
        """See `Guide.transform`."""
        loc, unravel = ravel_pytree(self.location.tree)
        return unravel(loc + nn.softplus(self.raw_scale) * base_noise)

    def log_prob(self, latents: PyTree) -> Float[Array, ""]:
        """See `Guide.log_prob`."""
        scale = nn.softplus(self.raw_scale)
        standardized = (flat(latents) - flat(self.location.tree)) / scale
        return standard_normal_log_prob(standardized) - jnp.sum(jnp.log(scale))

    def kl(self, scale: float) -> Float[Array, ""]:
        """See `Guide.kl`."""
        own = nn.softplus(self.raw_scale)
        return normal_kl(flat(self.location.tree), own**2, jnp.sum(jnp.log(own)), scale)
