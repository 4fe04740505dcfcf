"""The interface of a guide: a family of distributions over latents, as a Flax module.

A guide is a reparameterised distribution q. It turns standard normal noise into latents:

    latents = f(guide_params, base_noise),   base_noise ~ N(0, I)

The parameters of the guide are what is trained. The latents are a tree of real numbers, like the
tree that the guide was made for. `guide.init(key, key)["params"]` returns the initial parameters,
and `guide.apply({"params": guide_params}, key)` draws latents.

To add a guide, write one file like `_mean_field.py` with a subclass of `NormalGuide`,
`LocationGuide` or `Guide`, and import it in `guides/__init__.py`.

Reference: Kucukelbir et al. 2017, arXiv:1603.00788.
"""

import abc
import dataclasses
import math
from typing import Any, final

import attrs
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree


class Guide(nn.Module, abc.ABC):  # type: ignore[misc]
    """A family of distributions over a tree of latents.

    Subclasses implement the four abstract methods and override nothing else. Call the methods by
    `guide.apply({"params": guide_params}, ..., method="log_prob")`.

    Example:
        >>> from dpoptax.vi.guides import MeanField
        >>> isinstance(MeanField(jnp.zeros(2)), Guide)
        True
    """

    @final
    def __call__(self, key: PRNGKeyArray) -> PyTree:
        """Draws the latents."""
        return self.transform(self.noise(key))

    @abc.abstractmethod
    def noise(self, key: PRNGKeyArray) -> Any:
        """Draws the standard normal noise that `transform` takes."""

    @abc.abstractmethod
    def transform(self, base_noise: Any) -> PyTree:
        """Returns the latents for one draw of noise."""

    @abc.abstractmethod
    def log_prob(self, latents: PyTree) -> Float[Array, ""]:
        """Returns the log density log q(latents)."""

    @abc.abstractmethod
    def kl(self, scale: float) -> Float[Array, ""]:
        """Returns KL(q || N(0, scale**2 I)) in closed form.

        Raises:
            ValueError: the guide has no closed form; its prior must be a log density.
        """


@attrs.frozen(eq=False)
class Opaque:
    """Holds a tree that Flax leaves alone.

    Flax converts dictionaries and lists that are attributes of a module, which would change the
    structure of the latents.
    """

    tree: PyTree


class LocationGuide(Guide):
    """A guide with an initial location: the latents that it is made for.

    Attributes:
        latents: the initial location. After construction it is an `Opaque` that holds the arrays.
    """

    latents: PyTree

    def __post_init__(self) -> None:
        """Checks the latents. Flax runs this again on copies, which hold an `Opaque` already."""
        if not isinstance(self.latents, Opaque):
            self.latents = Opaque(_checked_latents(self.latents))
        # Flax registers the module here; after that its attributes are frozen.
        super().__post_init__()

    @final
    def _size(self) -> int:
        """Returns the number of scalar latents."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.latents.tree))

    @final
    def _location_param(self) -> Opaque:
        """Makes the parameter `loc`, a tree like the latents."""
        return Opaque(self.param("loc", lambda _: self.latents.tree))


class NormalGuide(LocationGuide):
    """A normal distribution with an initial standard deviation.

    Attributes:
        latents: as in `LocationGuide`.
        initial_scale: initial standard deviation of every latent.
    """

    initial_scale: float = dataclasses.field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the scale, then the latents."""
        _validate.positive("initial_scale", self.initial_scale)
        super().__post_init__()

    @final
    def _raw_scale_param(self, name: str) -> Float[Array, " latents"]:
        """Makes a parameter whose softplus is initially `initial_scale`."""
        # The inverse of softplus. Softplus keeps the scale positive for any value of the parameter.
        raw = math.log(math.expm1(self.initial_scale))
        value: Array = self.param(name, lambda _: jnp.full((self._size(),), raw, jnp.float32))
        return value


def _checked_latents(latents: PyTree) -> PyTree:
    """Returns the latents as arrays; refuses an empty tree and latents that are not floats."""
    if not jax.tree.leaves(latents):
        raise ValueError("a guide needs latents; got a tree without arrays.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(latents):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"latents{jax.tree_util.keystr(path)} must be floating-point; got "
                f"{jnp.result_type(leaf)}. Discrete latents have no reparameterised draw: sum "
                "over them in the log-likelihood."
            )
    return jax.tree.map(jnp.asarray, latents)


def flat(tree: PyTree) -> Float[Array, " latents"]:
    """Returns the leaves of a tree as one vector."""
    vector: Array = ravel_pytree(tree)[0]
    return vector


def standard_normal_log_prob(standardized: Float[Array, " latents"]) -> Float[Array, ""]:
    """Returns the log density of N(0, I)."""
    return -0.5 * (jnp.sum(standardized**2) + standardized.size * math.log(2 * math.pi))


def normal_kl(
    loc: Float[Array, " latents"],
    variances: Float[Array, " latents"],
    half_log_det: Float[Array, ""],
    scale: float,
) -> Float[Array, ""]:
    """Returns KL(N(loc, C) || N(0, scale**2 I)) from the diagonal and log determinant of C."""
    ratio = jnp.sum(loc**2 + variances) / scale**2
    return 0.5 * (ratio - loc.size) + loc.size * math.log(scale) - half_log_det
