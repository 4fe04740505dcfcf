"""What rounding may have taken from a squared norm is given back: upper bounds, for every rule.

The gradient of an example is a sum of terms, over positions or tokens, which may cancel. Rounding
is relative to the terms: of a gradient far smaller than they are, the computed norm may say zero.
And the weighted sum adds the terms of all examples, not their sums: a term much larger than the
clip bound, that another cancels, wipes out what the other examples have added before. So bounds on
the rounding are added to each squared norm, which no gradient that does not cancel can notice:

- ROUNDING * eps * (the squared norms of the terms), for the norm itself. No term of a clipped
  example then exceeds 1 / sqrt(ROUNDING * eps), 2,000 clip bounds.
- (SPREAD * eps * terms)^2 times the same, for the sum. Of T equal terms, the first half of one sign
  and the second of the other, the sum on the way is T / 2 terms, and T roundings of it, as a random
  walk, T^1.5 eps / 4 terms or so: now at most 1 / (8 SPREAD) clip bounds.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

# Rounding of a sum, in units of the last place of what it sums; about 1 was the largest seen.
ROUNDING = 2.0
# What sums on the way to a sum may lose, in the same units and per term.
SPREAD = 4.0


def rounded_up(
    sums: Float[Array, "*batch"], sizes: Float[Array, "*batch"], terms: int
) -> Float[Array, "*batch"]:
    """Adds to sums that are never negative what rounding may have taken from them.

    Args:
        sums: squared norms of sums of terms.
        sizes: at least the sum of the squared norms of the terms.
        terms: how many there are.

    Returns:
        An upper bound on the exact sums, close to them where little cancels.
    """
    eps = float(jnp.finfo(sums.dtype).eps)
    return jnp.maximum(sums, 0.0) + (ROUNDING * eps + (SPREAD * eps * terms) ** 2) * sizes


def sum_of_squares(leaf: Array, axis: tuple[int, ...]) -> Array:
    """Returns a sum of squares, and an upper bound where squares underflow.

    What multiplies it may be so large that the product is not small.

    Args:
        leaf: of floats.
        axis: to sum over.

    Returns:
        An array without these axes.
    """
    count = 1
    for place in axis:
        count *= leaf.shape[place]
    return jnp.sum(jnp.square(leaf), axis=axis) + count * jnp.finfo(leaf.dtype).tiny
