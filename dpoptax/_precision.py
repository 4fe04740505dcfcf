"""An array in, the same numbers in float32 or wider out.

Norms, sums and noise are never computed in 16 bits: a float16 square overflows at 256, and a
bfloat16 sum of ones stalls at 256.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def widen(leaf: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Casts 8- and 16-bit floats to float32; leaves float32 and float64 alone.

    Args:
        leaf: an array of floats.

    Returns:
        The same array, or a float32 copy.

    Example:
        >>> widen(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
    """
    return leaf if jnp.finfo(leaf.dtype).bits >= 32 else leaf.astype(jnp.float32)
