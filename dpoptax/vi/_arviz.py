"""Export to ArviZ, with public draws only."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from dpoptax import _validate

Draws = Mapping[str, ArrayLike]


def to_arviz(
    posterior: Draws,
    *,
    posterior_predictive: Draws | None = None,
    prior: Draws | None = None,
    prior_predictive: Draws | None = None,
    nonprivate_observed_data: Draws | None = None,
) -> Any:
    """Returns draws as an object of ArviZ, for its summaries, plots and comparisons.

    The draws are post-processing of private parameters, so the object is as private as they are.
    It holds neither log-likelihoods of the data nor losses. It holds data only if you pass them: it
    is then for your own eyes.

    ArviZ is optional: `pip install 'dpoptax[arviz]'`. Its versions 0.x and 1.x work.

    Args:
        posterior: by name, arrays with a leading axis of draws, such as
            `result.posterior(key, 1000)` of `DPSVI`.
        posterior_predictive: draws of `dpoptax.vi.numpyro.Predictive`.
        prior: draws of latents from the prior.
        prior_predictive: draws of data from the prior.
        nonprivate_observed_data: observations, without an axis of draws. They make the object
            private data: it must not be released, nor plots of it.

    Returns:
        An `arviz.InferenceData`, or an `xarray.DataTree` from ArviZ 1.0 on, with one chain.

    Raises:
        ImportError: ArviZ is not installed.
        TypeError: a group that is no dictionary.
        ValueError: draws of different number in one group.

    Example:
        >>> import jax.numpy as jnp
        >>> draws = {"slope": jnp.zeros(2)}
        >>> try:
        ...     to_arviz(draws, prior={"slope": jnp.zeros(2), "scale": jnp.ones(4)})
        ... except ValueError as error:
        ...     print(error)
        prior has different numbers of draws: [2, 4]. All arrays of a group must have one leading
        axis of draws.

    Reference: Kumar, Carroll, Hartikainen and Martin 2019, "ArviZ a unified library for exploratory
    analysis of Bayesian models in Python".
    """
    groups = {
        "posterior": posterior,
        "posterior_predictive": posterior_predictive,
        "prior": prior,
        "prior_predictive": prior_predictive,
    }
    content = {
        name: _with_chain(name, draws) for name, draws in groups.items() if draws is not None
    }
    if nonprivate_observed_data is not None:
        content["observed_data"] = _arrays("nonprivate_observed_data", nonprivate_observed_data)
    from_dict = _arviz().from_dict
    # Version 1 takes one dictionary of groups, version 0 one keyword for each.
    if "data" in inspect.signature(from_dict).parameters:
        return from_dict(content)
    return from_dict(**content)


def _arviz() -> Any:
    try:
        return importlib.import_module("arviz")
    except ImportError as error:
        raise ImportError(
            "to_arviz needs ArviZ, which is not installed: pip install 'dpoptax[arviz]'"
        ) from error


def _with_chain(group: str, draws: Draws) -> dict[str, np.ndarray]:
    arrays = _arrays(group, draws)
    counts = {np.shape(array)[0] if np.ndim(array) else 0 for array in arrays.values()}
    if len(counts) > 1:
        raise ValueError(
            f"{group} has different numbers of draws: {sorted(counts)}. All arrays of a group must "
            "have one leading axis of draws."
        )
    return {name: array[None] for name, array in arrays.items()}


def _arrays(group: str, values: Draws) -> dict[str, np.ndarray]:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{group} must be a dictionary of arrays by name; got {_validate.described(values)}. "
            "Pass for example result.posterior(key, 1000)."
        )
    return {name: np.asarray(value) for name, value in values.items()}
