"""Log density of partly observed values: missing entries are masked out safely."""

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
    """Returns the sum of the log densities of the entries that were observed.

    Missing entries are replaced before the density sees them, and left out of the sum afterwards.
    Multiplying by a mask is not enough: NaN times zero is NaN, in the value and in its gradient.

    Args:
        log_prob: an elementwise log density, such as that of independent entries.
        value: the values; missing entries may hold anything.
        observed: True for observed entries; by default those that are not NaN.
        stand_in: any value in the support; `log_prob` sees it in place of missing entries.

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
    # Twice `where`: before the density for its gradient, after it for its value.
    densities = log_prob(jnp.where(seen, value, jnp.asarray(stand_in, value.dtype)))
    return jnp.sum(jnp.where(seen, densities, jnp.zeros_like(densities)))
