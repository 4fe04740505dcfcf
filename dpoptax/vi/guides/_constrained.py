"""Constrained guide: a guide on the real line, mapped to simplices, positive numbers and so on.

With a bijection T from the real line to the support of the latents,

    z = T(x),   log q(z) = log q(x) - log |det dT/dx|

The supports and their bijections are NumPyro's: pip install 'dpoptax[numpyro]'.

Reference: Kucukelbir et al. 2017, arXiv:1603.00788, section 2.3.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import attrs
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi.guides._base import Guide, Opaque
from dpoptax.vi.guides._mean_field import MeanField


class Constrained(Guide):
    """A guide for latents that are positive, on a simplex, ordered, correlations and so on.

    The prior of its latents must be a log density: no normal prior has a closed form here. The
    parameters are those of the guide on the real line, under "unconstrained".

    Attributes:
        latents: a tree of arrays, the initial location, each inside its support. It must not depend
            on private data.
        supports: a tree of the same structure, of `numpyro.distributions.constraints`; `real` for
            latents on the whole line.
        make: makes the guide on the real line from its initial location, such as
            `functools.partial(LowRank, rank=2)`.

    Raises:
        TypeError: latents that are not floating-point, or a support of integers.
        ValueError: trees of different structures, or a latent outside its support.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro.distributions import constraints
        >>> guide = Constrained(
        ...     {"weights": jnp.ones(3) / 3, "scale": jnp.array(2.0)},
        ...     {"weights": constraints.simplex, "scale": constraints.positive},
        ... )
        >>> guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> draw = guide.apply({"params": guide_params}, jax.random.key(1))
        >>> draw["weights"].shape, round(float(draw["weights"].sum()), 5)
        ((3,), 1.0)

    Reference: Kucukelbir et al. 2017, arXiv:1603.00788.
    """

    latents: PyTree
    supports: PyTree
    make: Callable[[PyTree], Guide] = dataclasses.field(default=MeanField, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the arguments. Flax runs this again on copies, which hold `_Bijections`."""
        if not isinstance(self.supports, _Bijections):
            bijections = _bijections(self.latents, self.supports)
            location = _unconstrained_location(self.latents, bijections)
            self.make(location)  # so that a mistake is found here and not by the first draw
            self.latents, self.supports = Opaque(location), bijections
        super().__post_init__()

    def setup(self) -> None:
        """Makes the guide on the real line."""
        self.unconstrained: Guide = self.make(self.latents.tree)

    def noise(self, key: PRNGKeyArray) -> Any:
        """See `Guide.noise`."""
        return self.unconstrained.noise(key)

    def transform(self, base_noise: Any) -> PyTree:
        """See `Guide.transform`."""
        return self.supports.forward(self.unconstrained.transform(base_noise))

    def log_prob(self, latents: PyTree) -> Float[Array, ""]:
        """See `Guide.log_prob`."""
        unconstrained = self.supports.inverse(latents)
        log_det = self.supports.log_abs_det_jacobian(unconstrained, latents)
        return self.unconstrained.log_prob(unconstrained) - log_det

    def kl(self, scale: float) -> Float[Array, ""]:
        """Raises: a normal prior of constrained latents has no closed form.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"constrained latents have no normal prior, yet the prior is a scale, {scale}. Pass "
            "the log density of the latents for a prior, for example "
            "lambda latents: numpyro.distributions.Gamma(1.0).log_prob(latents['rate'])."
        )


@attrs.frozen(eq=False)
class _Bijections:
    """One bijection for each leaf of the latents, from the real line to its support."""

    treedef: Any
    transforms: tuple[Any, ...]

    def forward(self, unconstrained: PyTree) -> PyTree:
        """Maps the real line to the supports."""
        return self._map(lambda transform, leaf: transform(leaf), unconstrained)

    def inverse(self, latents: PyTree) -> PyTree:
        """Maps the supports to the real line."""
        return self._map(lambda transform, leaf: transform.inv(leaf), latents)

    def log_abs_det_jacobian(self, unconstrained: PyTree, latents: PyTree) -> Float[Array, ""]:
        """Returns log |det dT/dx|, summed over the leaves."""
        with jax.numpy_dtype_promotion("standard"):
            terms = [
                jnp.sum(transform.log_abs_det_jacobian(x, z))
                for transform, x, z in zip(
                    self.transforms,
                    self.treedef.flatten_up_to(unconstrained),
                    self.treedef.flatten_up_to(latents),
                    strict=True,
                )
            ]
        return jnp.stack(terms).sum()

    def _map(self, function: Callable[[Any, Array], Array], tree: PyTree) -> PyTree:
        leaves = self.treedef.flatten_up_to(tree)
        # NumPyro mixes integers and floats, which JAX's strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            mapped = [function(*pair) for pair in zip(self.transforms, leaves, strict=True)]
        return jax.tree.unflatten(self.treedef, mapped)


def _bijections(latents: PyTree, supports: PyTree) -> _Bijections:
    """Returns the bijections onto the supports; refuses latents that are outside of them."""
    from numpyro.distributions import biject_to, constraints  # optional: loaded when used

    is_support = lambda node: isinstance(node, constraints.Constraint)  # noqa: E731
    leaves, treedef = jax.tree.flatten(supports, is_leaf=is_support)
    expected = jax.tree.structure(latents)
    same_structure = treedef == expected  # type: ignore[operator]
    if not same_structure or not all(map(is_support, leaves)):
        raise ValueError(
            "supports must be a tree like the latents, of numpyro.distributions.constraints; got "
            f"{treedef} for {expected}."
        )
    paths = jax.tree_util.tree_leaves_with_path(latents)
    for (path, leaf), support in zip(paths, leaves, strict=True):
        name = f"latents{jax.tree_util.keystr(path)}"
        if support.is_discrete:
            raise TypeError(
                f"{name} has a support of integers, and so no reparameterised draw: sum over it "
                "in the log-likelihood."
            )
        if not bool(jnp.all(support(jnp.asarray(leaf)))):
            raise ValueError(
                f"{name} must start within its support, {support}; got a value outside. Choose "
                "an initial value inside."
            )
    return _Bijections(treedef, tuple(biject_to(support) for support in leaves))


def _unconstrained_location(latents: PyTree, bijections: _Bijections) -> PyTree:
    """Returns the latents on the real line; refuses a boundary, which is at infinity there."""
    location = bijections.inverse(jax.tree.map(jnp.asarray, latents))
    paths = jax.tree_util.tree_leaves_with_path(latents)
    for (path, _), value in zip(paths, jax.tree.leaves(location), strict=True):
        if not bool(jnp.all(jnp.isfinite(value))):
            raise ValueError(
                f"latents{jax.tree_util.keystr(path)} must start inside its support, not at an "
                "end, which is at infinity on the real line. Choose another initial value."
            )
    return location
