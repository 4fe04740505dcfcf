"""Point guide: one value without uncertainty, for parameters that are trained next to latents."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi.guides._base import LocationGuide, Opaque


class Point(LocationGuide):
    """One value without uncertainty: a maximum-likelihood parameter, such as a noise level.

    It has no density and no prior: `log_prob` and `kl` are zero. Its parameter is `loc`, a tree
    like the latents.

    Attributes:
        latents: as in `MeanField`.

    Raises:
        TypeError: as in `MeanField`.
        ValueError: no latents.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> guide = Point(jnp.ones(2))
        >>> guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> guide.apply({"params": guide_params}, jax.random.key(1))
        Array([1., 1.], dtype=float32)
    """

    def setup(self) -> None:
        """Makes the parameter."""
        self.location: Opaque = self._location_param()

    def noise(self, key: PRNGKeyArray) -> Float[Array, " 0"]:
        """Returns an empty vector: there is nothing to draw."""
        del key
        return jnp.zeros(0)

    def transform(self, base_noise: Float[Array, " 0"]) -> PyTree:
        """Returns the value."""
        del base_noise
        return self.location.tree

    def log_prob(self, latents: PyTree) -> Float[Array, ""]:
        """Returns zero: a value without uncertainty has no density."""
        del latents
        return jnp.zeros(())

    def kl(self, scale: float) -> Float[Array, ""]:
        """Returns zero: a value without uncertainty has no prior."""
        del scale
        return jnp.zeros(())
