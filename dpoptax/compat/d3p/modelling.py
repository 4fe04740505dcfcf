"""Draws from models and guides, under the names of `d3p.modelling`.

Nothing here is private by itself: draws of a posterior are as private as its parameters, and
observations that are passed to the model come back as they are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from numpyro import handlers

from dpoptax.compat.d3p._suites import as_key
from dpoptax.compat.d3p.util import unvectorize_shape_2d

__all__ = [
    "get_samples_from_trace",
    "make_observed_model",
    "map_args_obs_to_shape",
    "sample_multi_posterior_predictive",
    "sample_multi_prior_predictive",
    "sample_posterior_predictive",
    "sample_prior_predictive",
]


def __dir__() -> list[str]:
    return __all__


_Model = Callable[..., Any]


def get_samples_from_trace(
    trace: Mapping[str, Any], with_intermediates: bool = False
) -> dict[str, Any]:
    """Returns the values of all sample sites of a trace.

    Args:
        trace: what `numpyro.handlers.trace(model).get_trace(...)` returned.
        with_intermediates: whether to return pairs of a value and its intermediate draws.

    Returns:
        Values, or pairs, by the names of the sites.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(), obs=2.0)
        >>> get_samples_from_trace(numpyro.handlers.trace(model).get_trace())
        {'x': 2.0}
    """
    return {
        name: (site["value"], site["intermediates"]) if with_intermediates else site["value"]
        for name, site in trace.items()
        if site["type"] == "sample"
    }


def sample_prior_predictive(
    rng_key: Any,
    model: _Model,
    model_args: tuple[Any, ...],
    substitutes: Mapping[str, Any] | None = None,
    with_intermediates: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Draws all sites of a model once.

    Args:
        rng_key: a key.
        model: a model of NumPyro.
        model_args: its arguments.
        substitutes: values of sites that are not drawn.
        with_intermediates: as in `get_samples_from_trace`.
        **kwargs: more arguments of the model.

    Returns:
        Values, or pairs, by the names of the sites.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def model(n):
        ...     mean = numpyro.sample("mean", dist.Normal())
        ...     numpyro.sample("x", dist.Normal(mean, 1e-6), sample_shape=(n,))
        >>> draw = sample_prior_predictive(jax.random.key(0), model, (3,), {"mean": 5.0})
        >>> draw["x"].round(2).tolist()
        [5.0, 5.0, 5.0]
    """
    model = handlers.substitute(model, data=dict(substitutes or {}))
    return _draw(as_key(rng_key), model, model_args, with_intermediates, kwargs)


def sample_posterior_predictive(
    rng_key: Any,
    model: _Model,
    model_args: tuple[Any, ...],
    guide: _Model,
    guide_args: tuple[Any, ...],
    params: Mapping[str, Any],
    with_intermediates: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Draws the latents from a guide, and then all sites of the model given them.

    Args:
        rng_key: a key.
        model: a model of NumPyro.
        model_args: its arguments.
        guide: its guide.
        guide_args: the arguments of the guide.
        params: what `DPSVI.get_params` returned.
        with_intermediates: as in `get_samples_from_trace`.
        **kwargs: more arguments of model and guide.

    Returns:
        Values, or pairs, by the names of the sites of model and guide.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(numpyro.sample("mean", dist.Normal()), 1e-6))
        >>> def guide():
        ...     numpyro.sample("mean", dist.Delta(numpyro.param("loc", 0.0)))
        >>> draw = sample_posterior_predictive(
        ...     jax.random.key(0), model, (), guide, (), {"loc": 3.0})
        >>> round(float(draw["x"]), 2)
        3.0
    """
    model_key, guide_key = jax.random.split(as_key(rng_key))
    guide = handlers.substitute(guide, data=dict(params))
    latents = _draw(guide_key, guide, guide_args, with_intermediates, kwargs)
    values = {name: value[0] for name, value in latents.items()} if with_intermediates else latents
    model = handlers.substitute(model, data={**params, **values})
    return latents | _draw(model_key, model, model_args, with_intermediates, kwargs)


def sample_multi_prior_predictive(
    rng_key: Any,
    n: int,
    model: _Model,
    model_args: tuple[Any, ...],
    substitutes: Mapping[str, Any] | None = None,
    with_intermediates: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Draws `sample_prior_predictive` n times.

    Args:
        rng_key: a key.
        n: how many draws.
        model: as in `sample_prior_predictive`.
        model_args: as in `sample_prior_predictive`.
        substitutes: as in `sample_prior_predictive`.
        with_intermediates: as in `get_samples_from_trace`.
        **kwargs: more arguments of the model.

    Returns:
        Values, or pairs, with a first axis of draws.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def model(n):
        ...     numpyro.sample("x", dist.Normal(), sample_shape=(n,))
        >>> sample_multi_prior_predictive(jax.random.key(0), 4, model, (3,))["x"].shape
        (4, 3)
    """
    return jax.vmap(
        lambda key: sample_prior_predictive(
            key, model, model_args, substitutes, with_intermediates, **kwargs
        )
    )(jax.random.split(as_key(rng_key), n))


def sample_multi_posterior_predictive(
    rng_key: Any,
    n: int,
    model: _Model,
    model_args: tuple[Any, ...],
    guide: _Model,
    guide_args: tuple[Any, ...],
    params: Mapping[str, Any],
    with_intermediates: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Draws `sample_posterior_predictive` n times.

    Args:
        rng_key: a key.
        n: how many draws.
        model: as in `sample_posterior_predictive`.
        model_args: as in `sample_posterior_predictive`.
        guide: as in `sample_posterior_predictive`.
        guide_args: as in `sample_posterior_predictive`.
        params: as in `sample_posterior_predictive`.
        with_intermediates: as in `get_samples_from_trace`.
        **kwargs: more arguments of model and guide.

    Returns:
        Values, or pairs, with a first axis of draws.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def model(n):
        ...     mean = numpyro.sample("mean", dist.Normal())
        ...     numpyro.sample("x", dist.Normal(mean, 1.0), sample_shape=(n,))
        >>> def guide(n):
        ...     numpyro.sample("mean", dist.Normal(numpyro.param("loc", 0.0), 1.0))
        >>> draws = sample_multi_posterior_predictive(
        ...     jax.random.key(0), 4, model, (3,), guide, (3,), {"loc": 3.0})
        >>> draws["mean"].shape, draws["x"].shape
        ((4,), (4, 3))
    """
    return jax.vmap(
        lambda key: sample_posterior_predictive(
            key, model, model_args, guide, guide_args, params, with_intermediates, **kwargs
        )
    )(jax.random.split(as_key(rng_key), n))


def map_args_obs_to_shape(
    obs: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]:
    """Maps observations to their shape, for `make_observed_model`.

    Args:
        obs: observations.
        *args: left out.
        **kwargs: passed on.

    Returns:
        The shape with at least two axes, the keyword arguments, and `{"obs": obs}`.

    Example:
        >>> import jax.numpy as jnp
        >>> map_args_obs_to_shape(jnp.ones((3, 2)), k=4)[:2]
        ((3, 2), {'k': 4})
    """
    del args
    return unvectorize_shape_2d(obs), kwargs, {"obs": obs}


def make_observed_model(
    model: _Model,
    obs_to_model_args_fn: Callable[..., tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]],
) -> _Model:
    """Turns a generative model into one with observations, for `DPSVI`.

    Args:
        model: a model whose arguments hold no observations.
        obs_to_model_args_fn: from the arguments of the new model to the arguments of `model`, its
            keyword arguments, and the observations by the names of their sites.

    Returns:
        A model of the observations.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(n, d):
        ...     with numpyro.plate("rows", n):
        ...         return numpyro.sample("obs", dist.Normal(jnp.zeros(d)).to_event(1))
        >>> observed = make_observed_model(model, map_args_obs_to_shape)
        >>> numpyro.handlers.seed(observed, 0)(jnp.ones((3, 2))).shape
        (3, 2)
    """

    def observed(*args: Any, **kwargs: Any) -> Any:
        model_args, model_kwargs, observations = obs_to_model_args_fn(*args, **kwargs)
        return handlers.condition(model, data=observations)(*model_args, **model_kwargs)

    return observed


def _draw(
    key: Any, program: _Model, args: tuple[Any, ...], intermediates: bool, kwargs: dict[str, Any]
) -> dict[str, Any]:
    trace = handlers.trace(handlers.seed(program, key)).get_trace(*args, **kwargs)
    return get_samples_from_trace(trace, intermediates)
