"""Private quantile of gradient norms: a noisy binary search, which must be charged."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.mechanisms._gaussian_noise import add_gaussian
from dpoptax.per_example._stacked import as_per_example_grads
from dpoptax.random._allowed_keys import allowed_key

# Halvings of the range: eight decades in 256 parts, so the answer is exact to 8 %. More queries
# would be noisier each.
NUM_QUERIES = 8


def norm_quantile(
    grads: PyTree,
    quantile: float,
    noise_multiplier: float,
    key: PRNGKeyArray,
    *,
    smallest: float = 1e-4,
    largest: float = 1e4,
    params: PyTree | None = None,
) -> Float[Array, ""]:
    """Finds a number that about a share `quantile` of the gradient norms do not exceed.

    A clip bound can be chosen with it: take the gradients of one batch at the initial parameters.
    It halves the range from `smallest` to `largest` eight times on a logarithmic scale, and goes up
    where fewer norms than wanted are at most the middle:

        count = sum_i ([||g_i|| <= middle] - quantile) + stddev * N(0, 1) < 0
        stddev = noise_multiplier * max(quantile, 1 - quantile) * sqrt(8)

    This is a private release. One example contributes `1 - quantile` or `-quantile` to a count, so
    all eight together are one Gaussian release with `noise_multiplier`, for which an example
    contributes a vector of norm 1. You must charge it.

    - For a batch that was drawn by the ledger's sampler for the quantile alone, charge one step:
      `ledger.charge(noise_multiplier)`, or the event `sampler.event(noise_multiplier, 1)`.
    - For the batch of a step that also releases a gradient with noise multiplier z, charge that
      step at (z**-2 + noise_multiplier**-2)**-0.5 instead of z.

    A norm that is not finite counts as large.

    Args:
        grads: `PerExampleGrads`, or a tree of arrays with a leading example axis.
        quantile: strictly between 0 and 1.
        noise_multiplier: standard deviation of the noise, in terms of what an example contributes.
        key: for this release and nothing else.
        smallest: where the search begins; choose it without looking at the data.
        largest: where the search ends, chosen like `smallest`.
        params: the parameters, if `grads` is a plain tree: averaged gradients, which have no
            example axis, are then recognized by their shapes.

    Returns:
        A positive number between `smallest` and `largest`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or the gradients are not per example.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> norms = jnp.linspace(0.1, 10.0, 1000)
        >>> grads = {"w": norms[:, None] * jnp.array([0.6, 0.8])}
        >>> found = norm_quantile(grads, 0.5, 2.0, jax.random.key(0))
        >>> bool(abs(found - 5) < 1)
        True

    Reference: the counts are those of Andrew et al. 2021, arXiv:1905.03871. Gaussian releases that
    are chosen one after another compose to one: Dong, Roth and Su 2019, arXiv:1905.02383.
    """
    quantile = _validate.real("quantile", quantile)
    if not 0 < quantile < 1:
        raise ValueError(
            "quantile must lie strictly between 0 and 1, as the share of the norms below the "
            f"result; got {quantile:g}. Pass 0.5 for the median."
        )
    noise = _validate.non_negative("noise_multiplier", noise_multiplier)
    low, high = _validate.positive("smallest", smallest), _validate.positive("largest", largest)
    if not low < high:
        raise ValueError(
            f"smallest must be below largest; got {low:g} and {high:g}. Pass for example 1e-4 and "
            "1e4, chosen without looking at the data."
        )
    key = allowed_key("key", key)
    grads = as_per_example_grads(grads, params)
    squared = grads.global_squared_norms()
    log_squared = jnp.where(jnp.isfinite(squared), jnp.log(squared), jnp.inf)
    stddev = noise * max(quantile, 1 - quantile) * math.sqrt(NUM_QUERIES)
    # In logarithms of squares.
    bottom, top = jnp.float32(2 * math.log(low)), jnp.float32(2 * math.log(high))
    for query_key in jax.random.split(key, NUM_QUERIES):
        middle = (bottom + top) / 2
        counted = jnp.where(log_squared <= middle, jnp.float32(1 - quantile), -quantile)
        count = jnp.sum(jnp.where(grads.mask, counted, 0.0), dtype=jnp.float32)
        too_few = add_gaussian(query_key, count, stddev) < 0
        bottom, top = jnp.where(too_few, middle, bottom), jnp.where(too_few, top, middle)
    return jnp.exp((bottom + top) / 4)
