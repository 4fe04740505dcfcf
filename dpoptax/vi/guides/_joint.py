"""Joint guide: independent guides side by side, each for the latents of one name."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi.guides._base import Guide


class Joint(Guide):
    """Independent guides side by side. The latents are a dictionary with their names.

    Attributes:
        guides: guides by name.

    Raises:
        ValueError: no guides.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from dpoptax.vi.guides import MeanField, Point
        >>> guide = Joint({"w": MeanField(jnp.zeros(3)), "encoder": Point(jnp.ones(2))})
        >>> guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> sorted(guide.apply({"params": guide_params}, jax.random.key(1)))
        ['encoder', 'w']
    """

    guides: Mapping[str, Guide]

    def __post_init__(self) -> None:
        """Checks that there is a guide."""
        if not self.guides:
            raise ValueError(
                "Joint takes at least one guide by name; got none. Pass for example "
                'Joint({"w": MeanField(...)}).'
            )
        super().__post_init__()

    def noise(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Draws the noise of each guide, by name."""
        # Sorted, so that the draws do not depend on the order in which the guides were given.
        keys = jax.random.split(key, len(self.guides))
        return {
            name: guide.noise(guide_key)
            for (name, guide), guide_key in zip(sorted(self.guides.items()), keys, strict=True)
        }

    def transform(self, base_noise: Mapping[str, Any]) -> PyTree:
        """See `Guide.transform`."""
        return {name: guide.transform(base_noise[name]) for name, guide in self.guides.items()}

    def log_prob(self, latents: PyTree) -> Float[Array, ""]:
        """Returns the sum of the log densities: the guides are independent."""
        terms = [guide.log_prob(latents[name]) for name, guide in self.guides.items()]
        return jnp.stack(terms).sum()

    def kl(self, scale: float) -> Float[Array, ""]:
        """Returns the sum of the divergences."""
        return jnp.stack([guide.kl(scale) for guide in self.guides.values()]).sum()
