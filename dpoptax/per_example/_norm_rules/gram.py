"""Two Gram matrices in, the squared norm of a gradient that was never formed out.

||A'G||^2 = <A A', G G'>        (Li et al. 2022, arXiv:2110.05679)
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax.per_example._norm_rules.rounding import rounded_up, sum_of_squares


def squared_norms(
    inputs: Float[Array, "*batch t t"], cotangents: Float[Array, "*batch t t"]
) -> Float[Array, "*batch"]:
    """Returns `<A A', G G'>`, rounded up."""
    sizes = jnp.sqrt(sum_of_squares(inputs, (-2, -1))) * jnp.sqrt(
        sum_of_squares(cotangents, (-2, -1))
    )
    return rounded_up(jnp.sum(inputs * cotangents, axis=(-2, -1)), sizes, inputs.shape[-1])
