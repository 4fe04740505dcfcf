"""A NumPyro model and guide in, the negative ELBO as an objective of single examples out.

What is inside a plate over the data belongs to one example, and is clipped and noised; the rest,
log q(theta) - log p(theta), depends on parameters alone and is added after the noise. Which plates
are over the data shows in two traces, of one example and of two: they are those that grow.

Needs NumPyro: pip install 'dpoptax[numpyro]'.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO

from dpoptax import _validate
from dpoptax.vi._kl_after_noise import AtTheParameters
from dpoptax.vi.numpyro import _sites as sites

# Examples with missing numbers that are looked at at once.
ROWS = 256


class _Terms(NamedTuple):
    """Log densities of one traced example: its own, and of what all examples share."""

    own: Float[Array, ""]
    shared: Float[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class NumPyroElbo(AtTheParameters):
    """The negative ELBO of a NumPyro model and guide; made by `numpyro_elbo`."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    num_examples: int
    num_samples: int
    analytic_kl: bool
    kl_clipped: bool
    example: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    initial: Mapping[str, PyTree]
    transforms: Mapping[str, Any]
    # By site of the data.
    model_plates: Mapping[str, sites.Plate]
    guide_plates: Mapping[str, sites.Plate]

    def init(self) -> dict[str, PyTree]:
        """Returns the initial parameters, unconstrained: what is trained."""
        return {name: self.transforms[name].inv(value) for name, value in self.initial.items()}

    def constrain(self, params: PyTree) -> dict[str, PyTree]:
        """Returns the values of `numpyro.param` sites, as `Predictive` takes them."""
        return {name: self.transforms[name](value) for name, value in params.items()}

    def loss(self, point: PyTree, example: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of one example, on the scale of one example; see `Objective.loss`."""

        def one(key: PRNGKeyArray) -> Array:
            own, shared = self._terms(point, example, key)
            return -(own + shared / self.num_examples) if self.kl_clipped else -own

        return self._mean(one, key)

    def kl(self, psi: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """Returns log q(theta) - log p(theta) over draws of what all examples share."""
        return self._mean(lambda k: -self._terms(psi, self.example, k).shared, key)

    def check_data(self, data: PyTree) -> None:
        """Refuses data that the model takes for observed where they are NaN.

        Args:
            data: the arguments of the model, whole; looked at where they are known.

        Raises:
            ValueError: the density of a site is not a number.
        """
        leaves = jax.tree.leaves(data)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return
        missing = np.zeros(len(leaves[0]), bool)
        for leaf in map(np.asarray, leaves):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                missing |= np.isnan(leaf).reshape(len(leaf), -1).any(axis=1)
        if not missing.any():
            return
        rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[np.flatnonzero(missing)], data)
        for name, spoilt in self._nan_densities(rows).items():
            if spoilt:
                raise ValueError(
                    f"data hold NaN, and the density of site {name!r} is NaN there: the example "
                    "would count for nothing. Where x is missing, give the site "
                    "obs=jnp.where(observed, x, 0.0) within "
                    "numpyro.handlers.mask(mask=observed), observed = ~jnp.isnan(x)."
                )

    def _nan_densities(self, examples: PyTree) -> dict[str, Array]:
        """By observed site, whether its density is NaN for any of the examples."""
        values, key = self.constrain(self.init()), jax.random.key(0)

        def of_example(example: PyTree) -> dict[str, Array]:
            args = sites.repeated(example)
            model, _ = sites.trace_both(self.model, self.guide, values, args, self.kwargs, key)
            return {name: jnp.isnan(sites.log_prob(model[name])) for name in self.model_plates}

        with numpyro.validation_enabled(False):
            found = jax.jit(functools.partial(jax.lax.map, of_example, batch_size=ROWS))(examples)
        return {name: jnp.any(spoilt) for name, spoilt in found.items()}

    def _terms(self, params: PyTree, example: PyTree, key: PRNGKeyArray) -> _Terms:
        values = self.constrain(params)
        model, guide = sites.trace_both(
            self.model, self.guide, values, sites.repeated(example), self.kwargs, key
        )
        own, shared = [jnp.zeros(())], [jnp.zeros(())]
        for name, log_density in self._log_densities(model, guide):
            if name in self.model_plates:
                own.append(log_density / self.model_plates[name].scale)
            elif name in self.guide_plates:
                own.append(log_density / self.guide_plates[name].scale)
            else:
                shared.append(log_density)
        return _Terms(jnp.stack(own).sum(), jnp.stack(shared).sum())

    def _log_densities(self, model: sites.Trace, guide: sites.Trace) -> Iterator[tuple[str, Array]]:
        """By site, log p - log q; two entries where the two do not meet in closed form."""
        met = set()
        for name, site in sites.sample_sites(guide):
            prior = model.get(name)
            if self.analytic_kl and prior is not None:
                try:
                    divergence = kl_divergence(site["fn"], prior["fn"])
                except NotImplementedError:
                    pass
                else:
                    met.add(name)
                    yield name, -sites.scaled(jnp.sum(divergence), prior)
                    continue
            yield name, -sites.log_prob(site)
        yield from ((name, sites.log_prob(site)) for name, site in sites.sample_sites(model)
                    if name not in met)  # fmt: skip


def numpyro_elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_examples: int,
    loss: ELBO | None = None,
    kl: Literal["after_noise", "clipped"] = "after_noise",
    init_key: PRNGKeyArray,
    **kwargs: Any,
) -> NumPyroElbo:
    """Turns a NumPyro model and guide into an objective for private training.

    Pass it to `training.fit` in place of a loss, with the arguments of the model, as a tuple, for
    data. Nothing is initialised from data: of the arguments given here only shapes and types are
    looked at.

    Args:
        model: `model(*args, **kwargs)`, whose observed sites lie in a `numpyro.plate` over the
            data, `plate("data", num_examples, subsample_size=len(x))` or `plate("data", len(x))`.
        guide: of the same signature, or one of `numpyro.infer.autoguide`.
        *args: arrays with a leading axis of examples, or None.
        num_examples: N, a public constant.
        loss: `Trace_ELBO()`, by default, or `TraceMeanField_ELBO()` for closed forms of the
            divergences; with `num_particles`.
        kl: as in `dpoptax.vi.global_elbo`; "clipped" is what d3p does.
        init_key: for initial values that are drawn.
        **kwargs: further arguments of model and guide, the same for all examples.

    Returns:
        A `dpoptax.training.Objective` with `init()` for its parameters, and `constrain(params)` for
        their values as NumPyro knows them.

    Raises:
        TypeError: another loss, a number of the wrong kind, an old-style key.
        ValueError: sites that no private gradient can be had of; each is named, with a remedy.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, optax, dpoptax
        >>> import numpyro.distributions as dist
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("data", 200, subsample_size=len(x)):
        ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> guide = numpyro.infer.autoguide.AutoNormal(model)
        >>> x = jnp.ones(200)
        >>> with jax.numpy_dtype_promotion("standard"):
        ...     elbo = numpyro_elbo(model, guide, x, num_examples=200, init_key=jax.random.key(0))
        >>> sorted(elbo.init())
        ['mean_auto_loc', 'mean_auto_scale']

    Reference: Jälkö, Dikmen and Honkela 2017, arXiv:1610.08749.
    """
    loss = Trace_ELBO() if loss is None else loss
    if type(loss) not in (Trace_ELBO, TraceMeanField_ELBO):
        raise TypeError(
            "loss must be numpyro.infer.Trace_ELBO or TraceMeanField_ELBO, which are sums over "
            f"examples; got {type(loss).__name__}."
        )
    if kl not in ("after_noise", "clipped"):
        raise ValueError(f'kl is "after_noise" or "clipped"; got {kl!r}.')
    num_examples = _validate.num_examples(num_examples)
    _validate.leading_axis_size("args", args)
    example = jax.tree.map(_stand_in, args)
    key = _validate.typed_key("init_key", init_key)
    with warnings.catch_warnings():  # what it is about is an error below
        warnings.filterwarnings("ignore", "subsample_size does not match", UserWarning)
        both = [
            sites.trace_both(model, guide, {}, sites.repeated(example, size), kwargs, key)
            for size in (1, 2)
        ]
    (model_one, guide_one), (model_two, guide_two) = both
    sites.check_sites(model_one, guide_one)
    sites.check_plates(model_two)
    model_plates = sites.plates_of_data(model_one, model_two, num_examples)
    sites.check_observed(model_one, model_plates)
    initial, transforms = sites.parameters([model_one, guide_one])
    elbo = NumPyroElbo(
        model=model,
        guide=guide,
        num_examples=num_examples,
        num_samples=loss.num_particles,
        analytic_kl=isinstance(loss, TraceMeanField_ELBO),
        kl_clipped=kl == "clipped",
        example=example,
        kwargs=kwargs,
        initial=initial,
        transforms=transforms,
        model_plates=model_plates,
        guide_plates=sites.plates_of_data(guide_one, guide_two, num_examples),
    )
    _check_coupling(elbo, key)
    return elbo


def _stand_in(leaf: Any) -> Array:
    """An example in place of all: in the support of most likelihoods, where none is private."""
    dtype = jnp.result_type(leaf)
    return jnp.full(jnp.shape(leaf)[1:], 0.5 if jnp.issubdtype(dtype, jnp.inexact) else 0, dtype)


def _check_coupling(elbo: NumPyroElbo, key: PRNGKeyArray) -> None:
    """Spoils the second of two examples, and looks whether anything but its own follows."""

    def spoil(leaf: Array) -> Array:
        rows = sites.repeated(leaf, 2)
        return rows.at[1].set(jnp.nan if jnp.issubdtype(rows.dtype, jnp.inexact) else 1)

    def traced(args: PyTree) -> sites.Trace:
        values = dict(elbo.initial)
        model, guide = sites.trace_both(elbo.model, elbo.guide, values, args, elbo.kwargs, key)
        return {f"{name} of the guide": site for name, site in guide.items()} | dict(model)

    own = {
        **elbo.model_plates,
        **{f"{name} of the guide": plate for name, plate in elbo.guide_plates.items()},
    }
    with numpyro.validation_enabled(False):
        clean, spoilt = (
            traced(sites.repeated(elbo.example, 2)),
            traced(jax.tree.map(spoil, elbo.example)),
        )
        for name, site in sites.sample_sites(clean):
            before, after = (
                sites.first_example(found, own[name]) if name in own else sites.log_prob(found)
                for found in (site, spoilt[name])
            )
            if not jnp.all(jnp.isfinite(before)) or jnp.allclose(before, after, rtol=1e-4):
                continue
            if name in own:
                raise ValueError(
                    f"site {name!r} couples examples: its density for one depends on another. "
                    "A private gradient needs a density of each example by itself."
                )
            raise ValueError(
                f"site {name!r} lies in no plate over the data, yet its density depends on "
                "the data. Put it into that plate, or make it depend on constants alone."
            )
