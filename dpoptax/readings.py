"""Per-example gradients in, private readings of them out: what a person may look at while training.

Losses, norms and the share that is clipped are readings of the data. A histogram of norms with
noise is a release like any other, and costs privacy like one.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax import _checks
from dpoptax.clipping import ClipRule
from dpoptax.noise import add_gaussian
from dpoptax.per_example import PerExampleGrads, as_per_example_grads


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
    noise = _checks.non_negative("noise_multiplier", noise_multiplier)
    key = _checks.typed_key("key", key)
    grads = as_per_example_grads(grads)
    squared = jnp.stack(jax.tree.leaves(grads.squared_norms())).sum(axis=0)
    above = squared[:, None] >= jnp.asarray(bounds**2, squared.dtype)
    place = jnp.sum(above, axis=1, dtype=jnp.int32) - 1
    counted = grads.mask & jnp.isfinite(squared)
    ones = counted[:, None] & (place[:, None] == jnp.arange(len(bounds), dtype=jnp.int32))
    return add_gaussian(key, ones.sum(axis=0, dtype=jnp.float32), noise)


def nonprivate_norms(
    grads: PerExampleGrads, clip: ClipRule, step: Int[Array, ""] | int = 0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the share of a batch that a clip scales down, and the median norm. Not private.

    Args:
        grads: of the batch; padded rows do not count.
        clip: the rule that clips.
        step: where the rule is a schedule.

    Returns:
        Share and median, float32; NaN for an empty batch.

    Example:
        >>> import jax.numpy as jnp
        >>> from dpoptax.clipping import flat
        >>> grads = {"w": jnp.array([[0.3, 0.4], [3.0, 4.0], [0.0, 6.0]])}  # norms .5, 5, 6
        >>> grads = as_per_example_grads(grads)
        >>> [round(float(number), 2) for number in nonprivate_norms(grads, flat(1.0))]
        [0.67, 5.0]
    """
    squared = grads.squared_norms()
    norms = jnp.sqrt(jnp.stack(jax.tree.leaves(squared)).sum(axis=0).astype(jnp.float32))
    scaled = grads.mask & (clip.weights(squared, step) < 1)
    size = jnp.sum(grads.mask, dtype=jnp.float32)
    median = jnp.nanmedian(jnp.where(grads.mask, norms, jnp.nan))
    return jnp.sum(scaled, dtype=jnp.float32) / size, median
