"""Negative ELBO of a NumPyro model and guide, as an objective for private training.

Sites inside a plate over the data belong to one example: their gradient is clipped and noised. The
other terms, log q(latents) - log p(latents), depend on parameters alone and are added after the
noise. A plate is over the data if it grows between a trace with one example and one with two.

Reference: Jälkö, Dikmen and Honkela 2017, arXiv:1610.08749.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import attrs
import jax.numpy as jnp
import numpyro.infer
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.vi._elbo_terms import is_kl_clipped, mean_over_draws
from dpoptax.vi._kl_after_noise import add_kl_after_noise
from dpoptax.vi.numpyro import _sites as sites
from dpoptax.vi.numpyro._check_data import check_data
from dpoptax.vi.numpyro._data_arguments import split_keywords
from dpoptax.vi.numpyro._prepare import prepare


class _Terms(NamedTuple):
    """Log densities of one traced example: its own terms, and those that all examples share."""

    own: Float[Array, ""]
    shared: Float[Array, ""]


@attrs.frozen(eq=False)
class NumPyroElbo:
    """The negative ELBO of a NumPyro model and guide; made by `numpyro_elbo`.

    It is a `dpoptax.training.Objective`.

    Attributes:
        program: the model and the guide.
        num_examples: N, a public constant.
        num_samples: draws of the latents per example and step.
        analytic_kl: whether divergences are taken in closed form where there is one.
        kl_clipped: whether the divergence is part of the loss of every example.
        example: one example without data, for its shapes.
        initial: initial values of the `numpyro.param` sites.
        transforms: bijections from the real line to the supports of these sites.
        model_plates: the plate over the data of each site of the model that lies in one.
        guide_plates: likewise for the guide.
        scale: the constant of `numpyro.handlers.scale` around the likelihood, which is divided out.
    """

    program: sites.Program
    num_examples: int
    num_samples: int
    analytic_kl: bool
    kl_clipped: bool
    example: tuple[Any, ...]
    initial: Mapping[str, PyTree]
    transforms: Mapping[str, Any]
    model_plates: Mapping[str, sites.Plate]
    guide_plates: Mapping[str, sites.Plate]
    scale: float = 1.0

    def init(self) -> dict[str, PyTree]:
        """Returns the initial parameters on the real line, which are trained."""
        return {name: self.transforms[name].inv(value) for name, value in self.initial.items()}

    def constrain(self, params: PyTree) -> dict[str, PyTree]:
        """Returns the values of `numpyro.param` sites, as `Predictive` takes them."""
        return {name: self.transforms[name](value) for name, value in params.items()}

    def loss(self, point: PyTree, example: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """Returns the loss of one example, on the scale of one example."""

        def with_one_draw(key: PRNGKeyArray) -> Array:
            own, shared = self._terms(point, example, key)
            return -(own + shared / self.num_examples) if self.kl_clipped else -own

        return mean_over_draws(with_one_draw, key, self.num_samples)

    def kl(self, guide_params: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """Returns log q(latents) - log p(latents) over draws of the latents that examples share."""
        return mean_over_draws(
            lambda draw_key: -self._terms(guide_params, self.example, draw_key).shared,
            key,
            self.num_samples,
        )

    def gradient_point(self, params: PyTree, opt_state: Any) -> PyTree:
        """Returns the parameters: the gradients are taken there."""
        del opt_state
        return params

    def wrap(
        self, private: optax.GradientTransformation, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Returns `private` with the gradient of the divergence added after the noise."""
        # Then the divergence is in the loss already; adding it here would count it twice.
        if self.kl_clipped:
            return private
        return add_kl_after_noise(private, self.kl, self.num_examples, key)

    def data(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Returns a batch as one tuple: positional arguments, then those given by keyword.

        Args:
            args: positional arguments of the model.
            kwargs: the arguments that `numpyro_elbo` got by keyword, with a row for each example.

        Raises:
            TypeError: other keywords than those of `numpyro_elbo`.
        """
        given = len(args) + len(kwargs)
        names = self.program.data_names
        # Data that were given by keyword before may follow in their order.
        if not set(kwargs) <= set(names) or given != len(self.example):
            raise TypeError(
                f"expected {len(self.example)} arguments with a row for each example, of which "
                f"{list(names)} may be passed by keyword; got {len(args)} and {sorted(kwargs)}. "
                "Pass the same arguments as to init."
            )
        return (*args, *(kwargs[name] for name in names if name in kwargs))

    def check_data(self, data: PyTree) -> None:
        """Refuses data that the model cannot take, row by row.

        Args:
            data: all data: the positional arguments of the model, then those given by keyword.
                Inside a transformation of JAX nothing is checked.

        Raises:
            ValueError: NaN or infinity that reaches a density or its gradient, observations outside
                the support of their distribution, or parameters that start at a statistic of the
                data. The message names the site, and shows no value.
        """
        check_data(self.program, self.init(), self.constrain, self._local_plates(), data)

    def _local_plates(self) -> set[str]:
        return {*self.model_plates, *self.guide_plates}

    def _terms(self, params: PyTree, example: PyTree, key: PRNGKeyArray) -> _Terms:
        batch = sites.repeat_example(example)
        model, guide = self.program.trace(self.constrain(params), batch, key)
        own, shared = [jnp.zeros(())], [jnp.zeros(())]
        for name, log_density in self._log_densities(model, guide):
            # A plate of size N scales the density of one example by N, which is undone here.
            if name in self.model_plates:
                own.append(log_density / (self.model_plates[name].scale * self.scale))
            elif name in self.guide_plates:
                own.append(log_density / (self.guide_plates[name].scale * self.scale))
            else:
                shared.append(log_density / self.scale)
        return _Terms(jnp.stack(own).sum(), jnp.stack(shared).sum())

    def _log_densities(self, model: sites.Trace, guide: sites.Trace) -> Iterator[tuple[str, Array]]:
        """Yields log p - log q by site: one term in closed form, or two terms at the draw."""
        in_closed_form = set()
        for name, site in sites.sample_sites(guide):
            prior = model.get(name)
            if self.analytic_kl and prior is not None:
                try:
                    divergence = kl_divergence(site["fn"], prior["fn"])
                except NotImplementedError:
                    pass  # NumPyro knows no closed form: the draw below estimates it
                else:
                    in_closed_form.add(name)
                    yield name, -sites.scaled(jnp.sum(divergence), prior)
                    continue
            yield name, -sites.log_prob(site)
        for name, site in sites.sample_sites(model):
            if name not in in_closed_form:
                yield name, sites.log_prob(site)


def numpyro_elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_examples: int,
    loss: numpyro.infer.ELBO | None = None,
    kl: Literal["after_noise", "clipped"] = "after_noise",
    init_key: PRNGKeyArray,
    **kwargs: Any,
) -> NumPyroElbo:
    """Turns a NumPyro model and guide into an objective for private training.

    Pass it to `training.fit` in place of a loss, and pass the arguments of the model as a tuple for
    the data; arguments that were given by keyword follow in their order. Only shapes and dtypes of
    the arguments given here are used, so no initial value comes from them. Numbers that a guide
    holds already, for example of `init_to_value`, are taken as public.

    Args:
        model: `model(*args, **kwargs)`. Its observed sites lie in a `numpyro.plate` over the data,
            `plate("data", num_examples, subsample_size=len(x))`, `plate("data", len(x))` or
            `plate("data", num_examples)`.
        guide: a function with the same arguments, or a guide of `numpyro.infer.autoguide`.
        *args: arrays with a leading axis of examples, or None.
        num_examples: N, a public constant.
        loss: `Trace_ELBO()`, the default, or `TraceMeanField_ELBO()` for divergences in closed
            form; both with `num_particles`.
        kl: as in `dpoptax.vi.global_elbo`; "clipped" is what d3p does.
        init_key: a typed key for random initial values.
        **kwargs: further arguments of model and guide. An array as long as `args` is data; all
            others are public constants.

    Returns:
        A `dpoptax.training.Objective`. Its `init()` returns the parameters to train, and
        `constrain(params)` returns the values of the `numpyro.param` sites.

    Raises:
        TypeError: another loss, an argument of the wrong type, or an old-style key.
        ValueError: sites that have no private gradient; the message names the site and a remedy.

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
    # Exact types: a subclass may combine examples in another way than by a sum.
    if type(loss) not in (Trace_ELBO, TraceMeanField_ELBO):
        raise TypeError(
            "loss must be numpyro.infer.Trace_ELBO or TraceMeanField_ELBO, which are sums over "
            f"examples; got {type(loss).__name__}."
        )
    kl_clipped = is_kl_clipped(kl)
    num_examples = _validate.num_examples(num_examples)
    key = _validate.typed_key("init_key", init_key)
    data, names, constants = split_keywords(args, kwargs, num_examples)
    prepared = prepare(sites.Program(model, guide, constants, names), data, num_examples, key)
    return NumPyroElbo(
        num_examples=num_examples,
        num_samples=loss.num_particles,
        analytic_kl=isinstance(loss, TraceMeanField_ELBO),
        kl_clipped=kl_clipped,
        **prepared._asdict(),
    )
