"""Normal guides by their parameters: which leaf is a location, which a scale, which a covariance.

The tools of this package change gradients or posteriors of normal guides. They take a guide of
`dpoptax.vi.guides` or NumPyro, because the names of its parameters alone do not say what they are.
All parameters are those on the real line that are trained. Leaves that are not named here belong to
the model or to another guide, and stay as they are.
"""

import abc
from typing import Any, NoReturn

import attrs
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from dpoptax import _validate
from dpoptax._pytree import PyTree


@attrs.frozen
class Family(abc.ABC):
    """A normal distribution over all latents of a guide."""

    @abc.abstractmethod
    def loc(self, tree: PyTree) -> PyTree:
        """Returns the locations in a tree like the parameters."""

    @abc.abstractmethod
    def times_covariance(self, params: PyTree, rows: Float[Array, "rows latents"]) -> Array:
        """Returns each row times the covariance of the guide."""

    @abc.abstractmethod
    def moved(self, params: PyTree, loc: Array, more: Float[Array, "latents latents"]) -> PyTree:
        """Returns parameters with the location `loc`, and a covariance that is wider by `more`."""

    def vector(self, tree: PyTree) -> Float[Array, " latents"]:
        """Returns the locations in a tree like the parameters, as one vector."""
        vector: Array = ravel_pytree(self.loc(tree))[0]
        return vector

    def _with_loc(self, params: PyTree, loc: Array) -> PyTree:
        return {**params, **ravel_pytree(self.loc(params))[1](loc)}


@attrs.frozen
class Diagonal(Family):
    """Independent latents, whose standard deviation is the softplus of a parameter.

    Attributes:
        prefix: of the names of a NumPyro guide; None for `dpoptax.vi.guides.MeanField`.
        by_site: whether there are parameters for each site.
    """

    prefix: str | None = None
    by_site: bool = False

    def pairs(self, params: PyTree) -> list[tuple[str, str]]:
        """Returns the names of locations and their scales, in one order."""
        if self.prefix is None:
            return [("loc", "raw_scale")]
        if not self.by_site:
            return [(f"{self.prefix}_loc", f"{self.prefix}_scale")]
        ends = f"_{self.prefix}_loc", f"_{self.prefix}_scale"
        names = sorted(name.removesuffix(ends[0]) for name in params if name.endswith(ends[0]))
        return [(n + ends[0], n + ends[1]) for n in names if n + ends[1] in params]

    def loc(self, tree: PyTree) -> PyTree:
        """See `Family.loc`."""
        return {name: tree[name] for name, _ in self.pairs(tree)}

    def scales(self, params: PyTree) -> Float[Array, " latents"]:
        """Returns all standard deviations, in the order of the locations."""
        raw = [jnp.ravel(params[name]) for _, name in sorted(self.pairs(params))]
        return jax.nn.softplus(jnp.concatenate(raw))

    def times_covariance(self, params: PyTree, rows: Float[Array, "rows latents"]) -> Array:
        """See `Family.times_covariance`."""
        return rows * self.scales(params) ** 2

    def moved(self, params: PyTree, loc: Array, more: Float[Array, "latents latents"]) -> PyTree:
        """See `Family.moved`."""
        raw = inverse_softplus(jnp.sqrt(self.scales(params) ** 2 + jnp.diag(more)))
        wider, first = {}, 0
        for _, name in sorted(self.pairs(params)):
            size = params[name].size
            wider[name] = raw[first : first + size].reshape(params[name].shape)
            first += size
        return {**self._with_loc(params, loc), **wider}


@attrs.frozen
class FullRank(Family):
    """`AutoMultivariateNormal`: the covariance is `L L^T`."""

    prefix: str

    def loc(self, tree: PyTree) -> PyTree:
        """See `Family.loc`."""
        return {f"{self.prefix}_loc": tree[f"{self.prefix}_loc"]}

    def times_covariance(self, params: PyTree, rows: Float[Array, "rows latents"]) -> Array:
        """See `Family.times_covariance`."""
        factor = self._transform()(params[f"{self.prefix}_scale_tril"])
        return rows @ factor @ factor.T

    def moved(self, params: PyTree, loc: Array, more: Float[Array, "latents latents"]) -> PyTree:
        """See `Family.moved`."""
        name = f"{self.prefix}_scale_tril"
        factor = self._transform()(params[name])
        wider = jnp.linalg.cholesky(factor @ factor.T + more)
        return {**self._with_loc(params, loc), name: self._transform().inv(wider)}

    def _transform(self) -> Any:
        from numpyro.distributions import biject_to
        from numpyro.infer.autoguide import AutoMultivariateNormal

        return biject_to(AutoMultivariateNormal.scale_tril_constraint)


@attrs.frozen
class LowRank(Family):
    """`AutoLowRankMultivariateNormal`: the covariance is `S (I + F F^T) S` with diagonal S."""

    prefix: str

    def loc(self, tree: PyTree) -> PyTree:
        """See `Family.loc`."""
        return {f"{self.prefix}_loc": tree[f"{self.prefix}_loc"]}

    def times_covariance(self, params: PyTree, rows: Float[Array, "rows latents"]) -> Array:
        """See `Family.times_covariance`."""
        scale = jax.nn.softplus(params[f"{self.prefix}_scale"])
        factor = params[f"{self.prefix}_cov_factor"] * scale[:, None]
        return rows * scale**2 + (rows @ factor) @ factor.T

    def moved(self, params: PyTree, loc: Array, more: Float[Array, "latents latents"]) -> PyTree:
        """See `Family.moved`; only the variances widen, so that the rank stays."""
        scale = jax.nn.softplus(params[f"{self.prefix}_scale"])
        wider = jnp.sqrt(scale**2 + jnp.diag(more))
        name = f"{self.prefix}_cov_factor"
        return {
            **self._with_loc(params, loc),
            f"{self.prefix}_scale": inverse_softplus(wider),
            name: params[name] * (scale / wider)[:, None],
        }


def family_of(guide: Any) -> Family:
    """Returns the family of a guide; None stands for `dpoptax.vi.guides.MeanField`.

    Raises:
        TypeError: a guide of another kind.
    """
    name = type(guide).__name__
    if guide is None or (name == "MeanField" and _is_ours(guide)):
        return Diagonal()
    if not type(guide).__module__.startswith("numpyro."):
        _refuse(guide)
    from numpyro.distributions import constraints
    from numpyro.infer import autoguide

    # Exact classes: a subclass may have other parameters.
    makers = {
        autoguide.AutoNormal: lambda: Diagonal(guide.prefix, by_site=True),
        autoguide.AutoDiagonalNormal: lambda: Diagonal(guide.prefix),
        autoguide.AutoMultivariateNormal: lambda: FullRank(guide.prefix),
        autoguide.AutoLowRankMultivariateNormal: lambda: LowRank(guide.prefix),
    }
    if type(guide) not in makers:
        _refuse(guide)
    constraint = getattr(guide, "scale_constraint", constraints.softplus_positive)
    if constraint is not constraints.softplus_positive:
        raise TypeError(
            f"the scales of this {name} have the constraint {constraint}; expected NumPyro's "
            "default, softplus_positive. Leave scale_constraint as it is."
        )
    return makers[type(guide)]()


def mean_field_of(guide: Any, tool: str) -> Diagonal:
    """Returns the family of a guide with independent latents.

    Raises:
        TypeError: a guide of another kind.
    """
    family = family_of(guide)
    if not isinstance(family, Diagonal):
        raise TypeError(
            f"{tool} is for guides with one scale for each latent; got "
            f"{type(guide).__name__}, whose scales act on several latents. Use AutoNormal or "
            "AutoDiagonalNormal, or train without it."
        )
    return family


def inverse_softplus(scale: Array) -> Array:
    """Returns the parameter whose softplus is `scale`, in a form that does not overflow."""
    return scale + jnp.log(-jnp.expm1(-scale))


def _is_ours(guide: Any) -> bool:
    return type(guide).__module__.startswith("dpoptax.vi.guides")


def _refuse(guide: Any) -> NoReturn:
    raise TypeError(
        f"{_validate.described(guide)} has no location and scale that this tool knows. Expected "
        "None or MeanField, or of NumPyro: AutoNormal, AutoDiagonalNormal, "
        "AutoMultivariateNormal or AutoLowRankMultivariateNormal."
    )
