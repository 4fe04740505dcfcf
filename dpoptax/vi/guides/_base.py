"""A tree of latents in, a family of distributions over it out, as a small Flax module.

    theta = f(psi, eta),   eta ~ N(0, I)

The parameters psi of a guide are what is trained; theta is a tree like the one it was made for, on
the whole real line (`supports` takes it to other ones). Every guide has these methods, to be
called by `guide.apply({"params": psi}, ..., method="...")`:

    noise(key)      eta
    transform(eta)  theta
    log_prob(theta) log q(theta)
    kl(scale)       KL(q || N(0, scale**2 I)), exactly

and `guide.apply({"params": psi}, key)` draws theta. Its initial parameters are
`guide.init(key, key)["params"]`, a dictionary with the location under "loc".

Reference: Kucukelbir et al. 2017, arXiv:1603.00788; Ong, Nott and Smith 2018 for low rank.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from dpoptax import _validate


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """The latents that a guide is made for, at some location."""

    latents: PyTree

    @property
    def size(self) -> int:
        """How many numbers the latents are."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.latents))


class Guide(nn.Module):  # type: ignore[misc]
    """What all guides share; see the module's docstring."""

    start: Start
    initial_scale: float = 0.1

    def __call__(self, key: PRNGKeyArray) -> PyTree:
        """Draws the latents."""
        return self.transform(self.noise(key))

    def noise(self, key: PRNGKeyArray) -> Any:
        """Draws what `transform` takes: one flat standard normal vector."""
        return jax.random.normal(key, (self.start.size,))

    def transform(self, eta: Any) -> PyTree:
        """Returns the latents for one draw of noise."""
        raise NotImplementedError

    def log_prob(self, theta: PyTree) -> Float[Array, ""]:
        """Returns the log density of the latents."""
        raise NotImplementedError

    def kl(self, scale: float) -> Float[Array, ""]:
        """Returns the divergence from N(0, scale**2 I)."""
        raise NotImplementedError

    def _located(self) -> "Start":
        # In a holder, for Flax freezes dictionaries that are attributes of a module.
        return Start(self.param("loc", lambda _: self.start.latents))

    def _raw(self, name: str, shape: tuple[int, ...]) -> Array:
        """A parameter of which softplus is initially `initial_scale`."""
        value = math.log(math.expm1(self.initial_scale))
        raw: Array = self.param(name, lambda _: jnp.full(shape, value, jnp.float32))
        return raw


def arguments(latents: PyTree, initial_scale: float) -> dict[str, Any]:
    """Returns the attributes of a guide; refuses latents that no guide can have.

    Args:
        latents: as in `mean_field`.
        initial_scale: as in `mean_field`.

    Returns:
        The attributes of `Guide`, by name.

    Raises:
        TypeError: latents that are not floating-point.
        ValueError: no latents, or a scale that is not positive.
    """
    if not jax.tree.leaves(latents):
        raise ValueError("a guide needs latents; got a tree without arrays.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(latents):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"latents{jax.tree_util.keystr(path)} must be floating-point; got "
                f"{jnp.result_type(leaf)}. Discrete latents have no reparameterised draw: sum "
                "over them in the log-likelihood."
            )
    return {
        "start": Start(jax.tree.map(jnp.asarray, latents)),
        "initial_scale": _validate.positive("initial_scale", initial_scale),
    }
