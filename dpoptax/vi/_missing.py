"""Values with holes in, a log density of what was observed out."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def observed_log_prob(
    log_prob: Callable[[Array], Array],
    value: Float[Array, "..."],
    observed: Bool[Array, "..."] | None = None,
    *,
    stand_in: float = 0.0,
) -> Float[Array, ""]:
    """Sums log densities over the entries that were observed.

    What is missing is replaced before the density sees it, and left out after: NaN times zero is
    NaN, and so is a gradient that passes by one.

    Args:
        log_prob: elementwise, as of a distribution of independent entries.
        value: with anything where it is missing.
        observed: True for what was observed; by default what is not NaN.
        stand_in: any value in the support, seen by `log_prob` where there is none.

    Returns:
        A scalar, for a log-likelihood of `dpoptax.vi`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.array([1.0, jnp.nan, 2.0])
        >>> loss = lambda mean: observed_log_prob(lambda x: -0.5 * (x - mean) ** 2, x)
        >>> jax.value_and_grad(loss)(0.0)
        (Array(-2.5, dtype=float32), Array(3., dtype=float32, weak_type=True))
    """
    seen = ~jnp.isnan(value) if observed is None else observed
    densities = log_prob(jnp.where(seen, value, jnp.asarray(stand_in, value.dtype)))
    return jnp.sum(jnp.where(seen, densities, jnp.zeros_like(densities)))
