"""Synthetic data from the posterior predictive of a trained guide.

The guide's parameters are private already, so drawing data from it is post-processing and costs no
privacy. One synthetic data set understates how uncertain an estimate is. Draw several, and combine
the estimates by `dpoptax.vi.contrib.combine_synthetic_estimates`.

Reference: Jälkö et al. 2021, "Privacy-preserving data sharing via probabilistic modeling".
"""

from collections.abc import Callable

import jax
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.vi._elbo_terms import GuideModule


def synthetic_data(
    guide: GuideModule,
    guide_params: PyTree,
    simulate: Callable[[PyTree, PRNGKeyArray], PyTree],
    key: PRNGKeyArray,
    *,
    num_sets: int,
) -> PyTree:
    """Draws data sets from the posterior predictive: new latents for each, then data from them.

    Args:
        guide: a guide of `dpoptax.vi.guides`.
        guide_params: its trained parameters.
        simulate: `simulate(latents, key)`, a tree of arrays: one data set.
        key: a typed key for all draws.
        num_sets: number of data sets.

    Returns:
        A tree like one data set, with a leading axis `(num_sets, ...)`.

    Raises:
        TypeError: a number of sets that is not whole, or an old-style key.
        ValueError: a number of sets below 1.

    Example:
        >>> import jax, jax.numpy as jnp, dpoptax
        >>> guide = dpoptax.vi.guides.MeanField(jnp.zeros(()))
        >>> guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> def simulate(mean, key):
        ...     return mean + jax.random.normal(key, (100,))
        >>> synthetic_data(guide, guide_params, simulate, jax.random.key(1), num_sets=5).shape
        (5, 100)

    Reference: Jälkö et al. 2021, "Privacy-preserving data sharing via probabilistic modeling".
    """
    count = _validate.count("num_sets", num_sets)

    def draw_one_set(key: PRNGKeyArray) -> PyTree:
        latents_key, data_key = jax.random.split(key)
        return simulate(guide.apply({"params": guide_params}, latents_key), data_key)

    return jax.vmap(draw_one_set)(jax.random.split(_validate.typed_key("key", key), count))
