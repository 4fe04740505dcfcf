"""Functions of `d3p.svi` on gradients, and numbers that are read off a model's plates."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import handlers, validation_enabled

from dpoptax import _validate
from dpoptax._pytree import PyTree


def full_norm(vector_parts: PyTree, ord: Any = 2) -> Float[Array, ""]:
    """Returns the norm of all arrays of a tree as one vector.

    Args:
        vector_parts: a tree of arrays.
        ord: the norm, as in `jnp.linalg.norm`.

    Returns:
        A number; 0 for an empty tree.

    Example:
        >>> import jax.numpy as jnp
        >>> float(full_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}))
        5.0
    """
    leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(vector_parts)]
    return jnp.linalg.norm(jnp.concatenate(leaves), ord=ord) if leaves else jnp.zeros(())


def normalize_gradient(gradient_parts: PyTree, ord: Any = 2) -> PyTree:
    """Returns a tree divided by its norm.

    Args:
        gradient_parts: a tree of arrays.
        ord: as in `full_norm`.

    Returns:
        A tree of norm 1.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(full_norm(normalize_gradient((jnp.ones(2), jnp.ones(7))))), 4)
        1.0
    """
    norm = full_norm(gradient_parts, ord)
    return jax.tree.map(lambda leaf: leaf / norm, gradient_parts)


def clip_gradient(gradient_parts: PyTree, c: float) -> PyTree:
    """Shrinks a gradient to norm c, if it is longer. One that is not finite becomes 0.

    Args:
        gradient_parts: a tree of arrays.
        c: the bound.

    Returns:
        A tree of norm at most c.

    Raises:
        ValueError: c is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> clip_gradient(jnp.array([3.0, 4.0]), 2.5).tolist()
        [1.5, 2.0]
        >>> clip_gradient(jnp.array([jnp.nan, 4.0]), 1.0).tolist()
        [0.0, 0.0]
    """
    c = _validate.positive("c", c)
    norm = full_norm(gradient_parts)
    factor = 1 / jnp.maximum(1.0, norm / c)
    return jax.tree.map(
        lambda leaf: jnp.where(jnp.isfinite(norm), factor * leaf, 0), gradient_parts
    )


def get_observations_scale(
    model: Callable[..., Any],
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any],
    params: Mapping[str, Any],
) -> float:
    """Returns the factor of the log-likelihood of one observation.

    Args:
        model: a model of NumPyro.
        model_args: its arguments, with one example.
        model_kwargs: its keyword arguments.
        params: values of sites.

    Returns:
        The number of examples times the factor of `handlers.scale`; 1 without observed sites.

    Raises:
        ValueError: observed sites have different factors.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(x):
        ...     with numpyro.plate("data", 200, subsample_size=len(x)):
        ...         numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> get_observations_scale(model, (jnp.ones(1),), {}, {})
        200.0
    """
    program = handlers.substitute(handlers.seed(model, 0), data=dict(params))
    trace = handlers.trace(program).get_trace(*model_args, **model_kwargs)
    scales = {
        1.0 if site["scale"] is None else float(site["scale"])
        for site in trace.values()
        if site["type"] == "sample" and site["is_observed"]
    }
    if len(scales) > 1:
        raise ValueError(
            f"observed sites have the scales {sorted(scales)}, but one threshold clips their sum. "
            "Put them into one plate over the data."
        )
    return scales.pop() if scales else 1.0


def plate_size(model: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> int:
    """Returns the size of the plate over the data, from a trace of one example without data."""
    length = _validate.leading_axis_size("args", args)
    one = jax.tree.map(lambda leaf: jnp.zeros_like(jnp.asarray(leaf)[:1]), args)
    with validation_enabled(False):
        trace = handlers.trace(handlers.seed(model, 0)).get_trace(*one, **kwargs)
    sizes = {site["args"][0] for site in trace.values()
             if site["type"] == "plate" and site["args"][1] == 1}  # fmt: skip
    if len(sizes) != 1 or sizes == {1}:
        raise ValueError(
            "the number of examples is not known: no plate, or more than one, holds the batch of "
            f"{length} and has another size. Pass num_obs_total=."
        )
    return int(sizes.pop())
