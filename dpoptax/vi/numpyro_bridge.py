"""A NumPyro model and guide in, the negative ELBO as an objective of single examples out.

What is inside a plate over the data belongs to one example, and is clipped and noised; the rest,
log q(theta) - log p(theta), depends on parameters alone and is added after the noise. Which plates
are over the data shows in two traces, of one example and of two: they are those that grow.

Needs NumPyro: pip install 'dpoptax[numpyro]'.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO

from dpoptax import _checks
from dpoptax.vi.divergence import AtTheParameters

Trace = Mapping[str, Mapping[str, Any]]


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
    initial: Mapping[str, Array]
    transforms: Mapping[str, Any]
    # By site of the data, what a plate multiplies the log density of one example by.
    model_scales: Mapping[str, float]
    guide_scales: Mapping[str, float]

    def init(self) -> dict[str, Array]:
        """Returns the initial parameters, unconstrained: what is trained."""
        return {name: self.transforms[name].inv(value) for name, value in self.initial.items()}

    def constrain(self, params: PyTree) -> dict[str, Array]:
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
        leaves = [
            np.asarray(leaf) for leaf in jax.tree.leaves(data)
            if not isinstance(leaf, jax.core.Tracer)
        ]  # fmt: skip
        for leaf in leaves:
            if not np.issubdtype(leaf.dtype, np.floating):
                continue
            rows = np.isnan(leaf).reshape(len(leaf), -1).any(axis=1)
            if rows.any():
                first = int(rows.argmax())
                self._check_row(jax.tree.map(lambda leaf, row=first: leaf[row], data))

    def _check_row(self, example: PyTree) -> None:
        values = self.constrain(self.init())
        with numpyro.validation_enabled(False):
            model, _ = _traces(
                self.model, self.guide, values, _batch(example), self.kwargs, jax.random.key(0)
            )
            for name in self.model_scales:
                if jnp.isnan(_log_prob(model[name])):
                    raise ValueError(
                        f"data hold NaN, and the density of site {name!r} is NaN there: the "
                        "example would count for nothing. Where x is missing, give the site "
                        "obs=jnp.where(observed, x, 0.0) within "
                        "numpyro.handlers.mask(mask=observed), observed = ~jnp.isnan(x)."
                    )

    def _terms(self, params: PyTree, example: PyTree, key: PRNGKeyArray) -> _Terms:
        values = self.constrain(params)
        model, guide = _traces(self.model, self.guide, values, _batch(example), self.kwargs, key)
        own, shared = [jnp.zeros(())], [jnp.zeros(())]
        for name, log_density in self._log_densities(model, guide):
            if name in self.model_scales:
                own.append(log_density / self.model_scales[name])
            elif name in self.guide_scales:
                own.append(log_density / self.guide_scales[name])
            else:
                shared.append(log_density)
        return _Terms(jnp.stack(own).sum(), jnp.stack(shared).sum())

    def _log_densities(self, model: Trace, guide: Trace) -> Iterator[tuple[str, Array]]:
        """By site, log p - log q; two entries where the two do not meet in closed form."""
        met = set()
        for name, site in _sample_sites(guide):
            prior = model.get(name)
            if self.analytic_kl and prior is not None:
                try:
                    divergence = kl_divergence(site["fn"], prior["fn"])
                except NotImplementedError:
                    pass
                else:
                    met.add(name)
                    yield name, -_scaled(jnp.sum(divergence), prior)
                    continue
            yield name, -_log_prob(site)
        yield from ((name, _log_prob(site)) for name, site in _sample_sites(model)
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
    num_examples = _checks.num_examples(num_examples)
    _checks.batch_size("args", args)
    example = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf)[1:], jnp.result_type(leaf)), args)
    key = _checks.typed_key("init_key", init_key)
    traces = [_traces(model, guide, {}, _batch(example, size), kwargs, key) for size in (1, 2)]
    (model_one, guide_one), (model_two, guide_two) = traces
    _check_sites(model_one, guide_one)
    model_scales = _scales_of_data(model_one, model_two, num_examples)
    _check_observed(model_one, model_scales)
    initial, transforms = _parameters([model_one, guide_one])
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
        model_scales=model_scales,
        guide_scales=_scales_of_data(guide_one, guide_two, num_examples),
    )
    _check_coupling(elbo, key)
    return elbo


def _traces(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    values: Mapping[str, Array],
    args: Any,
    kwargs: Mapping[str, Any],
    key: PRNGKeyArray,
) -> tuple[Trace, Trace]:
    """Traces the guide, and the model with the latents that the guide drew."""
    guide_key, model_key = jax.random.split(key)
    seeded = handlers.substitute(handlers.seed(guide, guide_key), data=values)
    guide_trace = handlers.trace(seeded).get_trace(*args, **kwargs)
    params = {name: site["value"] for name, site in guide_trace.items() if site["type"] == "param"}
    replayed = handlers.replay(handlers.seed(model, model_key), guide_trace)
    substituted = handlers.substitute(replayed, data={**params, **values})
    return handlers.trace(substituted).get_trace(*args, **kwargs), guide_trace


def _batch(example: PyTree, size: int = 1) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), example)


def _sample_sites(trace: Trace) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((name, site) for name, site in trace.items() if site["type"] == "sample")


def _scaled(value: Array, site: Mapping[str, Any]) -> Array:
    return value if site["scale"] is None else site["scale"] * value


def _log_prob(site: Mapping[str, Any]) -> Array:
    if site["intermediates"]:
        found = site["fn"].log_prob(site["value"], site["intermediates"])
    else:
        found = site["fn"].log_prob(site["value"])
    return _scaled(jnp.sum(found), site)


def _parameters(traces: list[Trace]) -> tuple[dict[str, Array], dict[str, Any]]:
    initial, transforms = {}, {}
    for trace in traces:  # the guide's win
        for name, site in trace.items():
            if site["type"] == "param":
                transforms[name] = biject_to(site["kwargs"].get("constraint", constraints.real))
                initial[name] = jnp.asarray(site["value"], jnp.result_type(site["value"], float))
            elif site["type"] == "mutable":
                raise ValueError(
                    f"site {name!r} is mutable state: updating it from data is not private. Use "
                    "a module without it."
                )
    return initial, transforms


def _check_sites(model: Trace, guide: Trace) -> None:
    latents = {name for name, site in _sample_sites(model) if not site["is_observed"]}
    drawn = {
        name for name, site in _sample_sites(guide) if not site["infer"].get("is_auxiliary", False)
    }
    if latents != drawn:
        lacking, beyond = sorted(latents - drawn), sorted(drawn - latents)
        raise ValueError(
            f"the guide must draw the latent sites of the model; it lacks {lacking} and has "
            f"{beyond} too many. Give sites the same names in both."
        )
    for name in sorted(latents):
        if model[name]["fn"].support.is_discrete:
            raise ValueError(
                f"site {name!r} is a discrete latent, which has no reparameterised gradient. Sum "
                "over it in the likelihood, as numpyro.distributions.MixtureSameFamily does."
            )


def _scales_of_data(one: Trace, two: Trace, num_examples: int) -> dict[str, float]:
    """By site inside a plate that grows with the batch: the scale of one example's log density."""
    scales: dict[str, float] = {}
    for name, site in _sample_sites(one):
        sizes = {frame.name: frame.size for frame in site["cond_indep_stack"]}
        grown = [
            frame.name
            for frame in two[name]["cond_indep_stack"]
            if frame.size != sizes.get(frame.name)
        ]
        if not grown:
            continue
        full = [float(one[plate]["args"][0]) for plate in grown]
        # plate(len(x)) has the size of the batch, plate(N, subsample_size=len(x)) that of the data.
        if len(grown) > 1 or full[0] not in (1.0, float(num_examples)):
            raise ValueError(
                f"site {name!r} lies in the plate(s) over the data {grown} of size(s) "
                f"{[int(size) for size in full]}; expected one, of size {num_examples}, the number "
                f"of examples: plate({grown[0]!r}, {num_examples}, subsample_size=len(x))."
            )
        scales[name] = full[0]
    return scales


def _check_observed(model: Trace, scales: Mapping[str, float]) -> None:
    for name, site in _sample_sites(model):
        if site["is_observed"] and name not in scales:
            raise ValueError(
                f"observed site {name!r} lies in no plate over the data, so nobody can tell which "
                "part of it belongs to which example. Put it into numpyro.plate('data', "
                "num_examples, subsample_size=len(x))."
            )


def _check_coupling(elbo: NumPyroElbo, key: PRNGKeyArray) -> None:
    """Spoils the second of two examples, and looks whether anything but its own follows."""

    def spoil(leaf: Array) -> Array:
        rows = _batch(leaf, 2)
        return rows.at[1].set(jnp.nan) if jnp.issubdtype(rows.dtype, jnp.floating) else rows

    def traced(args: PyTree) -> Trace:
        values = dict(elbo.initial)
        model, guide = _traces(elbo.model, elbo.guide, values, args, elbo.kwargs, key)
        return {f"{name} of the guide": site for name, site in guide.items()} | dict(model)

    own = {*elbo.model_scales, *(f"{name} of the guide" for name in elbo.guide_scales)}
    with numpyro.validation_enabled(False):
        clean, spoilt = traced(_batch(elbo.example, 2)), traced(jax.tree.map(spoil, elbo.example))
        for name, site in _sample_sites(clean):
            of = _first_example if name in own else _log_prob
            if not jnp.all(jnp.isfinite(of(site))) or jnp.all(jnp.isfinite(of(spoilt[name]))):
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


def _first_example(site: Mapping[str, Any]) -> Array:
    """The log density of the first of two examples, whichever axis the plate has."""
    found = jnp.asarray(site["fn"].log_prob(site["value"]))
    (frame,) = (frame for frame in site["cond_indep_stack"] if frame.size == 2)
    return jnp.take(found, 0, axis=frame.dim)
