"""Two Gram matrices in, the squared norm of a gradient that was never formed out.

    ||A'G||^2 = <A A', G G'>        (Li et al. 2022, arXiv:2110.05679)

Terms of both signs may cancel, and rounding is relative to the terms: of a gradient far smaller
than its factors the sum may say zero. So a bound on the rounding is added, which no gradient that
does not cancel can notice, and which keeps the others from leaving the ball.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

# Rounding of a sum, in units of the last place of what it sums; about 1 was the largest seen.
ROUNDING = 2.0


def squared_norms(
    inputs: Float[Array, "*batch t t"], cotangents: Float[Array, "*batch t t"]
) -> Float[Array, "*batch"]:
    """Returns `<A A', G G'>`, rounded up."""

    def total(products: Array) -> Array:
        return jnp.sum(products, axis=(-2, -1))

    sizes = jnp.sqrt(total(jnp.square(inputs))) * jnp.sqrt(total(jnp.square(cotangents)))
    return rounded_up(total(inputs * cotangents), sizes)


def rounded_up(
    sums: Float[Array, "*batch"], sizes: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Adds to sums that are never negative what rounding may have taken from them.

    Args:
        sums: of terms of both signs.
        sizes: what the terms may come to without their signs.

    Returns:
        An upper bound on the exact sums, close to them where little cancels.
    """
    return jnp.maximum(sums, 0.0) + ROUNDING * jnp.finfo(sums.dtype).eps * sizes
