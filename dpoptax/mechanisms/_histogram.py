"""Private histogram of gradient norms: a noisy release, which must be charged to the ledger."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.mechanisms._gaussian_noise import add_gaussian
from dpoptax.per_example._stacked import as_per_example_grads
from dpoptax.random._allowed_keys import allowed_key


def norm_histogram(
    grads: PyTree,
    edges: Sequence[float],
    noise_multiplier: float,
    key: PRNGKeyArray,
    *,
    params: PyTree | None = None,
) -> Float[Array, " bins"]:
    """Counts the examples with a gradient norm between two edges, with Gaussian noise.

        counts = sum_i onehot(bin(||g_i||)) + noise_multiplier * N(0, I)

    This is a private release: one example adds a vector of norm one, as in a step with clip 1. You
    must charge it.

    - For a batch that was drawn by the ledger's sampler for the histogram alone, charge one step:
      `ledger.charge(noise_multiplier)`.
    - For the batch of a step that also releases a gradient with noise multiplier z, charge that
      step at (z**-2 + noise_multiplier**-2)**-0.5 instead of z. Both releases use the same draw of
      examples, so charging them one by one would be too little.

    Norms that are not finite fall into no bin.

    Args:
        grads: `PerExampleGrads`, or a tree of arrays with a leading example axis.
        edges: increasing, starting at 0. Choose them without looking at the data. The last bin has
            no upper edge.
        noise_multiplier: standard deviation of the noise of a count.
        key: for this histogram and nothing else.
        params: the parameters, if `grads` is a plain tree: averaged gradients, which have no
            example axis, are then recognized by their shapes.

    Returns:
        `(len(edges),)` noisy counts. They may be negative.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the edges do not increase from 0, the noise multiplier is out of range, or the
            gradients are not per example.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> grads = {"w": jnp.array([[0.3, 0.4], [3.0, 4.0], [0.0, 0.1]])}  # norms .5, 5, .1
        >>> norm_histogram(grads, (0.0, 1.0), 1e-6, jax.random.key(0)).round()
        Array([2., 1.], dtype=float32)

    Reference: Dwork and Roth 2014, section 3.3, for histograms.
    """
    bounds = np.asarray(edges, np.float64)
    if bounds.ndim != 1 or not len(bounds) or bounds[0] != 0 or not np.all(np.diff(bounds) > 0):
        raise ValueError(
            "edges must increase from 0; got numbers that do not. Pass for example "
            "(0.0, 0.5, 1.0, 2.0), chosen without looking at the data."
        )
    noise = _validate.non_negative("noise_multiplier", noise_multiplier)
    key = allowed_key("key", key)
    grads = as_per_example_grads(grads, params)
    squared = grads.global_squared_norms()
    reached = squared[:, None] >= jnp.asarray(bounds**2, squared.dtype)
    bin_index = jnp.sum(reached, axis=1, dtype=jnp.int32) - 1
    counted = grads.mask & jnp.isfinite(squared)
    bins = jnp.arange(len(bounds), dtype=jnp.int32)
    ones = counted[:, None] & (bin_index[:, None] == bins)
    return add_gaussian(key, ones.sum(axis=0, dtype=jnp.float32), noise)
