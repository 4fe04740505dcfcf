"""Non-private diagnostics of a step: the clipped fraction and the median gradient norm."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._explicit_axes import replicated_results
from dpoptax.clipping import ClipRule
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._base import global_squared_norms


@replicated_results
def nonprivate_norms(
    grads: PerExampleGrads, clip: ClipRule, step: Int[Array, ""] | int = 0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the clipped fraction of a batch and its median gradient norm. Not private.

    An empty batch gives NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from dpoptax.clipping import FlatClip
        >>> from dpoptax.per_example._stacked import as_per_example_grads
        >>> grads = {"w": jnp.array([[0.3, 0.4], [3.0, 4.0], [0.0, 6.0]])}  # norms .5, 5, 6
        >>> grads = as_per_example_grads(grads)
        >>> [round(float(number), 2) for number in nonprivate_norms(grads, FlatClip(1.0))]
        [0.67, 5.0]
    """
    squared = grads.squared_norms()
    norms = jnp.sqrt(global_squared_norms(squared).astype(jnp.float32))
    # Padding belongs to nobody. A gradient that is not finite has weight zero, so it counts.
    clipped = grads.mask & (clip.weights(squared, step) < 1)
    size = jnp.sum(grads.mask, dtype=jnp.float32)
    median = jnp.nanmedian(jnp.where(grads.mask, norms, jnp.nan))
    return jnp.sum(clipped, dtype=jnp.float32) / size, median
