"""A trained guide in, synthetic data sets out; estimates from several of them in, one out.

All of it is post-processing of private parameters and costs nothing. One synthetic set understates
how uncertain an estimate is; the spread between sets says how much.

Reference: Raghunathan, Reiter and Rubin 2003, "Multiple imputation for statistical disclosure
limitation"; Jälkö et al. 2021, "Privacy-preserving data sharing via probabilistic modeling".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from dpoptax import _validate


class Combined(NamedTuple):
    """What several synthetic sets say together.

    Attributes:
        estimate: the mean of the estimates.
        variance: of that estimate, about the truth.
        degrees_of_freedom: of the t distribution to make an interval by.
    """

    estimate: np.ndarray
    variance: np.ndarray
    degrees_of_freedom: np.ndarray


def synthetic_data(
    guide: nn.Module,
    psi: PyTree,
    simulate: Callable[[PyTree, PRNGKeyArray], PyTree],
    key: PRNGKeyArray,
    *,
    num_sets: int,
) -> PyTree:
    """Draws data sets from the posterior predictive: latents anew for each, then data from them.

    Args:
        guide: of `dpoptax.vi.guides`.
        psi: its trained parameters.
        simulate: `simulate(theta, key)`, a tree of arrays: one data set.
        key: for all draws.
        num_sets: how many.

    Returns:
        A tree like one data set, with a leading axis `(num_sets, ...)`.

    Raises:
        TypeError: a number of sets that is not whole, an old-style key.
        ValueError: a number of sets below 1.

    Example:
        >>> import jax, jax.numpy as jnp, dpoptax
        >>> guide = dpoptax.vi.guides.MeanField(jnp.zeros(()))
        >>> psi = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> def simulate(mean, key):
        ...     return mean + jax.random.normal(key, (100,))
        >>> synthetic_data(guide, psi, simulate, jax.random.key(1), num_sets=5).shape
        (5, 100)

    Reference: Jälkö et al. 2021, "Privacy-preserving data sharing via probabilistic modeling".
    """
    count = _validate.count("num_sets", num_sets)

    def one(key: PRNGKeyArray) -> PyTree:
        theta_key, data_key = jax.random.split(key)
        return simulate(guide.apply({"params": psi}, theta_key), data_key)

    return jax.vmap(one)(jax.random.split(_validate.typed_key("key", key), count))


def combine(estimates: Any, variances: Any) -> Combined:
    """Combines the estimates from several fully synthetic data sets, by Rubin's rules.

    With m sets, b the variance between estimates and u the mean of their own variances,

        T = (1 + 1/m) b - u,   (m - 1) (1 - u / ((1 + 1/m) b))**2 degrees of freedom

    Where T is not positive, as may happen with few sets, u stands for it, which is too large.

    Args:
        estimates: `(sets, ...)`, one estimate from each set.
        variances: of the same shape; what each set says of the variance of its own estimate.

    Returns:
        A `Combined` of arrays `(...)`.

    Raises:
        ValueError: fewer than two sets, shapes that differ, or a negative variance.

    Example:
        >>> found = combine([1.0, 3.0, 2.0], [0.1, 0.1, 0.1])
        >>> float(found.estimate), round(float(found.variance), 3)
        (2.0, 1.233)

    Reference: Raghunathan, Reiter and Rubin 2003, equations 3 to 5; Reiter 2002 for T below zero.
    """
    q, u = np.asarray(estimates, float), np.asarray(variances, float)
    if q.shape != u.shape or q.ndim == 0 or len(q) < 2:
        raise ValueError(
            "estimates and variances must be of one shape, (sets, ...) with two sets or more; got "
            f"{q.shape} and {u.shape}."
        )
    if np.any(u < 0):
        raise ValueError(f"a variance cannot be negative; got {u.min()}.")
    between, within = (1 + 1 / len(q)) * q.var(axis=0, ddof=1), u.mean(axis=0)
    total = between - within
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = (len(q) - 1) * np.where(between > 0, 1 - within / between, 0.0) ** 2
    return Combined(
        estimate=q.mean(axis=0),
        variance=np.where(total > 0, total, within),
        degrees_of_freedom=np.where(total > 0, freedom, len(q) - 1),
    )
