"""Widen 16-bit floats to float32 for norms, sums and noise.

None of these is ever computed in 16 bits: a float16 square overflows at 256, and a running sum of
ones in bfloat16 stops growing at 256.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def widen(leaf: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Casts 8- and 16-bit floats to float32; returns float32 and float64 as they are."""
    return leaf if jnp.finfo(leaf.dtype).bits >= 32 else leaf.astype(jnp.float32)


def wide_dtype(dtype: Any) -> Any:
    """Returns float64 for float64, and float32 for all narrower floats."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
