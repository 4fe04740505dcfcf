"""Private histogram of gradient norms: a release with noise of its own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from dpoptax import _validate
from dpoptax.mechanisms._gaussian_noise import add_gaussian
from dpoptax.per_example import as_per_example_grads


def norm_histogram(
    grads: PyTree, edges: Sequence[float], noise_multiplier: float, key: PRNGKeyArray
) -> Float[Array, " bins"]:
    """Returns how many examples have a gradient norm between two edges, with noise.

        counts = sum_i onehot(bin(||g_i||)) + noise_multiplier * N(0, I)

    An example adds a vector of norm one, so this is a step with clip 1. For a batch that the
    ledger's sampler drew for it alone, charge it as one: `ledger.charge(noise_multiplier)`. For the
    batch of a step that also releases a gradient with noise multiplier z, charge that step at
    (z**-2 + noise_multiplier**-2)**-0.5 in place of z: both look at the same draw, so that charging
    them one by one would be too little. Norms that are not finite fall into no bin.

    Args:
        grads: `PerExampleGrads`, or a tree of arrays with a leading example axis.
        edges: increasing, from 0 on, chosen without looking at the data; the last bin has no end.
        noise_multiplier: standard deviation of the noise of a count.
        key: used once, here.

    Returns:
        `(len(edges),)` noisy counts; they may be negative.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: edges that do not increase from 0, or a noise multiplier out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> grads = {"w": jnp.array([[0.3, 0.4], [3.0, 4.0], [0.0, 0.1]])}  # norms .5, 5, .1
        >>> norm_histogram(grads, (0.0, 1.0), 1e-6, jax.random.key(0)).round()
        Array([2., 1.], dtype=float32)

    Reference: Dwork and Roth 2014, section 3.3, for histograms.
    """
    bounds = np.asarray(edges, np.float64)
    if bounds.ndim != 1 or not len(bounds) or bounds[0] != 0 or not np.all(np.diff(bounds) > 0):
        raise ValueError(f"edges must increase from 0, as in (0.0, 0.5, 1.0, 2.0); got {edges}.")
    noise = _validate.non_negative("noise_multiplier", noise_multiplier)
    key = _validate.typed_key("key", key)
    grads = as_per_example_grads(grads)
    squared = jnp.stack(jax.tree.leaves(grads.squared_norms())).sum(axis=0)
    above = squared[:, None] >= jnp.asarray(bounds**2, squared.dtype)
    place = jnp.sum(above, axis=1, dtype=jnp.int32) - 1
    counted = grads.mask & jnp.isfinite(squared)
    ones = counted[:, None] & (place[:, None] == jnp.arange(len(bounds), dtype=jnp.int32))
    return add_gaussian(key, ones.sum(axis=0, dtype=jnp.float32), noise)
