"""Normal autoguides of NumPyro, with the interface of `dpoptax.vi.guides`.

    latents = loc + scale base_noise

on the real line: a dict of arrays by site. The parameters keep the names that NumPyro gives them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.infer.autoguide
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions import Normal, biject_to
from numpyro.infer import autoguide

from dpoptax._pytree import PyTree
from dpoptax.vi.numpyro import _sites as sites
from dpoptax.vi.numpyro._elbo import NumPyroElbo

# By name of the parameter without the prefix of the guide, its value.
_Values = Mapping[str, Array]


def _affine_diagonal(values: _Values, noise: Array) -> Array:
    return values["loc"] + values["scale"] * noise


def _affine_cholesky(values: _Values, noise: Array) -> Array:
    return values["loc"] + values["scale_tril"] @ noise


def _affine_low_rank(values: _Values, noise: Array) -> Array:
    size = len(values["loc"])
    along = values["cov_factor"] @ noise[size:]
    return values["loc"] + values["scale"] * (along + noise[:size])


# One vector for all latents. A new autoguide joins by one line.
_OF_VECTOR: Mapping[type, Callable[[_Values, Array], Array]] = {
    autoguide.AutoDiagonalNormal: _affine_diagonal,
    autoguide.AutoMultivariateNormal: _affine_cholesky,
    autoguide.AutoLowRankMultivariateNormal: _affine_low_rank,
}


@attrs.frozen(eq=False)
class NormalAutoguide:
    """A normal autoguide; made by `normal_autoguide`.

    Attributes:
        autoguide: the guide of NumPyro.
        constrain: from parameters on the real line to values of `numpyro.param` sites.
        transforms: by site, the bijection from the real line to its support.
        shapes: by site, the shape of its latents on the real line, in the order of the guide.
    """

    autoguide: numpyro.infer.autoguide.AutoGuide
    constrain: Callable[[PyTree], Mapping[str, Any]]
    transforms: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def apply(self, variables: Any, *args: Any, method: str | None = None) -> Any:
        """Calls a method of the guide, as Flax does."""
        values = self.constrain(variables["params"])
        if method == "noise":
            return self._noise(values, *args)
        if method == "transform":
            return self._transform(values, *args)
        if method == "log_prob":
            return self._log_prob(values, *args)
        if method is None:
            return self._transform(values, self._noise(values, *args))
        raise ValueError(f"an autoguide has no {method} in closed form: pass the prior as density.")

    def constrain_latents(self, latents: PyTree) -> dict[str, Array]:
        """Returns the values of the sites of the model."""
        return {name: transform(latents[name]) for name, transform in self.transforms.items()}

    def unconstrain_latents(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Returns latents on the real line from values of the sites of the model."""
        return {name: transform.inv(values[name]) for name, transform in self.transforms.items()}

    def log_det(self, latents: PyTree) -> Float[Array, ""]:
        """Returns the log determinant of the map from the real line to the supports."""
        found = [
            jnp.sum(transform.log_abs_det_jacobian(latents[name], transform(latents[name])))
            for name, transform in self.transforms.items()
        ]
        return jnp.stack(found).sum()

    def _noise(self, values: Mapping[str, Array], key: PRNGKeyArray) -> Array:
        size = sum(int(np.prod(shape)) for shape in self.shapes.values())
        if isinstance(self.autoguide, autoguide.AutoLowRankMultivariateNormal):
            size += values[f"{self.autoguide.prefix}_cov_factor"].shape[-1]
        return jax.random.normal(key, (size,))

    def _transform(self, values: Mapping[str, Array], noise: Array) -> dict[str, Array]:
        affine = _OF_VECTOR.get(type(self.autoguide))
        if affine is not None:
            return self._unravel(affine(self._of_vector(values), noise))
        own = self._unravel(noise)
        return {name: loc + scale * own[name] for name, (loc, scale) in self._by_site(values)}

    def _log_prob(self, values: Mapping[str, Array], latents: PyTree) -> Float[Array, ""]:
        if type(self.autoguide) in _OF_VECTOR:
            flat = jnp.concatenate([jnp.ravel(latents[name]) for name in self.shapes])
            return jnp.sum(self.autoguide.get_posterior(values).log_prob(flat))
        each = [
            jnp.sum(Normal(loc, scale).log_prob(latents[name]))
            for name, (loc, scale) in self._by_site(values)
        ]
        return jnp.stack(each).sum()

    def _of_vector(self, values: Mapping[str, Array]) -> _Values:
        prefix = f"{self.autoguide.prefix}_"
        return {name.removeprefix(prefix): value for name, value in values.items()}

    def _by_site(self, values: Mapping[str, Array]) -> list[tuple[str, tuple[Array, Array]]]:
        prefix = self.autoguide.prefix
        return [
            (name, (values[f"{name}_{prefix}_loc"], values[f"{name}_{prefix}_scale"]))
            for name in self.shapes
        ]

    def _unravel(self, flat: Array) -> dict[str, Array]:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        parts = jnp.split(flat, ends[:-1])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def normal_autoguide(guide: Any, elbo: NumPyroElbo) -> NormalAutoguide:
    """Returns the guide of an objective; refuses one that is no normal autoguide."""
    known = (autoguide.AutoNormal, *_OF_VECTOR)
    if type(guide) not in known:
        raise TypeError(
            f"aligned gradients need one of {[kind.__name__ for kind in known]}, whose latents are "
            f"loc + scale * noise; got {type(guide).__name__}. numpyro_elbo takes any guide."
        )
    batch = sites.repeat_example(elbo.example)
    values = elbo.constrain(elbo.init())
    key = jax.random.key(0)
    trace = elbo.program.guide_trace(values, batch, key)
    names = [
        name
        for name, site in sites.sample_sites(trace)
        if not site["infer"].get("is_auxiliary", False)
    ]
    local = [name for name in names if name in (*elbo.guide_plates, *elbo.model_plates)]
    if local:
        raise ValueError(
            f"sites {local} have one latent for each example, and aligned gradients are for "
            "latents that all examples share. Use numpyro_elbo."
        )
    own = set(elbo.init()) - {name for name in trace if trace[name]["type"] == "param"}
    if own:
        raise ValueError(
            f"the model has parameters {sorted(own)} besides its latents. Give them a prior, or "
            "use numpyro_elbo."
        )
    transforms = {name: biject_to(guide.prototype_trace[name]["fn"].support) for name in names}
    shapes = {
        name: tuple(transforms[name].inverse_shape(np.shape(trace[name]["value"])))
        for name in names
    }
    normal = NormalAutoguide(guide, elbo.constrain, transforms, shapes)
    _check_draws(normal, elbo, batch, key)
    return normal


def _check_draws(normal: NormalAutoguide, elbo: NumPyroElbo, batch: PyTree, key: Any) -> None:
    """Checks that the latents of a vector are in the order that NumPyro gives them."""
    if type(normal.autoguide) not in _OF_VECTOR:
        return
    params = elbo.init()
    latents = normal.apply({"params": params}, key)
    flat = ravel_pytree([latents[name] for name in normal.shapes])[0]
    site = f"_{normal.autoguide.prefix}_latent"
    substituted = handlers.substitute(normal.autoguide, data={site: flat})
    program = attrs.evolve(elbo.program, guide=substituted)
    trace = program.guide_trace(elbo.constrain(params), batch, key)
    for name, value in normal.constrain_latents(latents).items():
        if not np.allclose(value, trace[name]["value"], rtol=1e-4, atol=1e-5):
            raise ValueError(
                f"site {name!r} is not where it should be among the latents of "
                f"{type(normal.autoguide).__name__}: this version of NumPyro has another order. "
                "Use AutoNormal."
            )
