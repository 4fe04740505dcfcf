"""A guide on the real line in, one on simplices, positive numbers and the like out.

    z = T(theta),   log q(z) = log q(theta) - log |det dT/dtheta|

Supports and the bijections T are NumPyro's: pip install 'dpoptax[numpyro]'.

Reference: Kucukelbir et al. 2017, arXiv:1603.00788, section 2.3.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from dpoptax.vi.guides._normals import mean_field


@dataclasses.dataclass(frozen=True, eq=False)
class Bijections:
    """One map for each leaf of the latents, from the real line to its support."""

    treedef: Any
    transforms: tuple[Any, ...]

    def forward(self, theta: PyTree) -> PyTree:
        """From the real line to the supports."""
        return self._mapped(lambda transform, leaf: transform(leaf), theta)

    def inverse(self, latents: PyTree) -> PyTree:
        """From the supports to the real line."""
        return self._mapped(lambda transform, leaf: transform.inv(leaf), latents)

    def log_volume(self, theta: PyTree, latents: PyTree) -> Float[Array, ""]:
        """The logarithm of what the maps stretch volumes by, at `theta`."""
        with jax.numpy_dtype_promotion("standard"):
            parts = [
                jnp.sum(transform.log_abs_det_jacobian(x, z))
                for transform, x, z in zip(
                    self.transforms,
                    self.treedef.flatten_up_to(theta),
                    self.treedef.flatten_up_to(latents),
                    strict=True,
                )
            ]
        return jnp.stack(parts).sum()

    def _mapped(self, function: Callable[[Any, Array], Array], tree: PyTree) -> PyTree:
        leaves = self.treedef.flatten_up_to(tree)
        # NumPyro mixes integers and floats.
        with jax.numpy_dtype_promotion("standard"):
            mapped = [function(*pair) for pair in zip(self.transforms, leaves, strict=True)]
        return jax.tree.unflatten(self.treedef, mapped)


class Constrained(nn.Module):  # type: ignore[misc]
    """A guide seen through bijections; made by `constrained`."""

    unconstrained: nn.Module
    bijections: Bijections

    def __call__(self, key: PRNGKeyArray) -> PyTree:
        """Draws the latents."""
        return self.transform(self.noise(key))

    def noise(self, key: PRNGKeyArray) -> Any:
        """See `Guide.noise`."""
        return self.unconstrained.noise(key)

    def transform(self, eta: Any) -> PyTree:
        """See `Guide.transform`."""
        return self.bijections.forward(self.unconstrained.transform(eta))

    def log_prob(self, theta: PyTree) -> Float[Array, ""]:
        """See `Guide.log_prob`."""
        line = self.bijections.inverse(theta)
        volume = self.bijections.log_volume(line, theta)
        return self.unconstrained.log_prob(line) - volume

    def kl(self, scale: float) -> Float[Array, ""]:
        """Refuses: a normal prior has no closed form here.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"constrained latents have no normal prior, yet the prior is a scale, {scale}. Pass "
            "the log density of the latents for a prior, for example "
            "lambda latents: numpyro.distributions.Gamma(1.0).log_prob(latents['rate'])."
        )


def constrained(
    latents: PyTree, supports: PyTree, *, make: Callable[[PyTree], nn.Module] = mean_field
) -> Constrained:
    """Makes a guide of latents that are positive, on a simplex, ordered, correlations and so on.

    Args:
        latents: a tree of arrays, the initial location, each within its support; it must not
            depend on private data.
        supports: a tree of the same form, of `numpyro.distributions.constraints`; `real` for what
            is on the whole line.
        make: the guide of the latents as they are on the real line, such as
            `functools.partial(low_rank, rank=2)`.

    Returns:
        A Flax module like any other guide, but that the prior of its latents must be a log
        density. Its parameters are those of `make`, under "unconstrained".

    Raises:
        TypeError: latents that are not floating-point, or a support of integers.
        ValueError: trees of different forms, or a latent outside its support.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro.distributions import constraints
        >>> guide = constrained(
        ...     {"weights": jnp.ones(3) / 3, "scale": jnp.array(2.0)},
        ...     {"weights": constraints.simplex, "scale": constraints.positive},
        ... )
        >>> psi = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> draw = guide.apply({"params": psi}, jax.random.key(1))
        >>> draw["weights"].shape, round(float(draw["weights"].sum()), 5)
        ((3,), 1.0)

    Reference: Kucukelbir et al. 2017, arXiv:1603.00788.
    """
    from numpyro.distributions import biject_to, constraints

    is_support = lambda node: isinstance(node, constraints.Constraint)  # noqa: E731
    wanted, treedef = jax.tree.flatten(supports, is_leaf=is_support)
    found = jax.tree.structure(latents)
    matches = treedef == found  # type: ignore[operator]
    if not matches or not all(map(is_support, wanted)):
        raise ValueError(
            "supports must be a tree like the latents, of numpyro.distributions.constraints; got "
            f"{treedef} for {found}."
        )
    paths = jax.tree_util.tree_leaves_with_path(latents)
    for (path, leaf), support in zip(paths, wanted, strict=True):
        name = f"latents{jax.tree_util.keystr(path)}"
        if support.is_discrete:
            raise TypeError(
                f"{name} has a support of integers, and so no reparameterised draw: sum over it "
                "in the log-likelihood."
            )
        if not bool(jnp.all(support(jnp.asarray(leaf)))):
            raise ValueError(f"{name} must start within its support, {support}; got {leaf}.")
    bijections = Bijections(treedef, tuple(biject_to(support) for support in wanted))
    line = bijections.inverse(jax.tree.map(jnp.asarray, latents))
    for (path, leaf), found in zip(paths, jax.tree.leaves(line), strict=True):
        if not bool(jnp.all(jnp.isfinite(found))):
            raise ValueError(
                f"latents{jax.tree_util.keystr(path)} must start inside its support, not at an "
                f"end; got {leaf}."
            )
    return Constrained(make(line), bijections)
