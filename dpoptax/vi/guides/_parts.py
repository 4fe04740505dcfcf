"""Guides in, one guide out: side by side, and with values that are not latents among them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from dpoptax.vi.guides._base import Guide, arguments


class Point(Guide):
    """One value, no uncertainty; made by `point`."""

    def setup(self) -> None:
        """Names the parameter."""
        self.located = self._located()

    def noise(self, key: PRNGKeyArray) -> Array:
        """See `Guide.noise`."""
        del key
        return jnp.zeros(0)

    def transform(self, eta: Array) -> PyTree:
        """See `Guide.transform`."""
        del eta
        return self.located.latents

    def log_prob(self, theta: PyTree) -> Float[Array, ""]:
        """Returns zero: a value that is not a latent has no density."""
        del theta
        return jnp.zeros(())

    def kl(self, scale: float) -> Float[Array, ""]:
        """Returns zero: no prior pulls at it."""
        del scale
        return jnp.zeros(())


class Joint(nn.Module):  # type: ignore[misc]
    """Independent guides side by side, for latents by name; made by `joint`."""

    guides: Mapping[str, nn.Module]

    def __call__(self, key: PRNGKeyArray) -> PyTree:
        """Draws the latents."""
        return self.transform(self.noise(key))

    def noise(self, key: PRNGKeyArray) -> Any:
        """Draws what `transform` takes, by name."""
        keys = jax.random.split(key, len(self.guides))
        return {
            name: guide.noise(part)
            for (name, guide), part in zip(sorted(self.guides.items()), keys, strict=True)
        }

    def transform(self, eta: Any) -> PyTree:
        """See `Guide.transform`."""
        return {name: guide.transform(eta[name]) for name, guide in self.guides.items()}

    def log_prob(self, theta: PyTree) -> Float[Array, ""]:
        """See `Guide.log_prob`."""
        parts = [guide.log_prob(theta[name]) for name, guide in self.guides.items()]
        return jnp.stack(parts).sum()

    def kl(self, scale: float) -> Float[Array, ""]:
        """See `Guide.kl`."""
        return jnp.stack([guide.kl(scale) for guide in self.guides.values()]).sum()


def point(latents: PyTree) -> Point:
    """Makes a guide of one value: for parameters that are trained beside latents.

    Args:
        latents: as in `mean_field`.

    Returns:
        A Flax module with `loc`.

    Raises:
        TypeError: as in `mean_field`.
        ValueError: as in `mean_field`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> guide = point(jnp.ones(2))
        >>> psi = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> guide.apply({"params": psi}, jax.random.key(1))
        Array([1., 1.], dtype=float32)
    """
    return Point(**arguments(latents, 1.0))


def joint(**guides: nn.Module) -> Joint:
    """Puts guides side by side: independent, each for the latents of its name.

    Args:
        **guides: by name.

    Returns:
        A Flax module; its latents are a dictionary of those names.

    Raises:
        ValueError: no guides.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from dpoptax.vi.guides import mean_field
        >>> guide = joint(w=mean_field(jnp.zeros(3)), encoder=point(jnp.ones(2)))
        >>> psi = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> sorted(guide.apply({"params": psi}, jax.random.key(1)))
        ['encoder', 'w']
    """
    if not guides:
        raise ValueError("joint takes at least one guide by name, joint(w=mean_field(...)).")
    return Joint(guides)
