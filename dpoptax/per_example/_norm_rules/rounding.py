"""Upper bounds on squared norms: what rounding may have removed is added back.

The gradient of an example is a sum of terms, one per position or token, and the terms may cancel.
Rounding errors are relative to the terms, so if the gradient is much smaller than its terms, its
computed norm may be far too small, or even zero. The sum has such errors too. So each squared norm
is increased by a bound on them, which is negligible for a gradient whose terms do not cancel.

With S the sum of the squared norms of the terms, T their number, and eps the machine epsilon:

    bound = squared norm + ROUNDING * eps * S + (SPREAD * eps * T)^2 * S

- `ROUNDING * eps * S` covers the error of the squared norm itself. It also limits every term of a
  clipped example to 1 / sqrt(ROUNDING * eps) clip bounds, about 2,000 in float32.
- `(SPREAD * eps * T)^2 * S` covers the error of the gradient in the sum. The worst case has T equal
  terms, the first half of one sign and the second half of the other. The partial sums reach T / 2
  terms, and T roundings of them, as a random walk, add up to about T^1.5 * eps / 8 terms. The bound
  makes that at most 1 / (8 * SPREAD) clip bounds.

Where a few examples of several terms are summed together, the terms are limited further: the bound
is at least S / MAX_CANCELLATION^2. `docs/numerics.md` says what follows for the sum of a batch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import widen
from dpoptax.per_example._batch_sum import MAX_CANCELLATION, examples_per_chunk

# Error of a computed squared norm in units of eps * S. The largest that was observed is about 1.
ROUNDING = 2.0
# Error of a partial sum per term, in units of eps. With 4, what rounding adds to the gradient of an
# example is at most 1/32 of a clip bound, for up to 2**16 terms that cancel, as a test asserts.
SPREAD = 4.0


def round_up(
    sums: Float[Array, "*batch"], sizes: Float[Array, "*batch"], num_terms: int
) -> Float[Array, "*batch"]:
    """Returns the bound above, for squared norms `sums` and with `sizes` at least S."""
    eps = float(jnp.finfo(sums.dtype).eps)
    bound = jnp.maximum(sums, 0.0) + (ROUNDING * eps + (SPREAD * eps * num_terms) ** 2) * sizes
    if examples_per_chunk(num_terms) == 1:
        return bound
    return jnp.maximum(bound, sizes / MAX_CANCELLATION**2)


def sum_of_squares(leaf: Array, axes: tuple[int, ...]) -> Array:
    """Sums squares over `axes`, as an upper bound where squares underflow.

    A square that underflows is below `tiny`, so one `tiny` per summed number is added. This matters
    because the sum is often multiplied by a large number, and the product need not be small.
    """
    leaf = widen(leaf)
    count = 1
    for axis in axes:
        count *= leaf.shape[axis]
    return jnp.sum(jnp.square(leaf), axis=axes) + count * jnp.finfo(leaf.dtype).tiny
