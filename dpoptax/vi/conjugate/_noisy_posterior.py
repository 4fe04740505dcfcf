"""Parameters given noisy statistics: a chain over the true statistics, then exact draws."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax.vi.conjugate import _hmc
from dpoptax.vi.conjugate._moments import Factor, Hyperparameters, draw_parameters


class Noisy(NamedTuple):
    """What the density of the statistics depends on."""

    values: Float[Array, " statistics"]
    noise_stddev: Float[Array, ""]
    prior: Hyperparameters
    num_examples: Float[Array, ""]


class Statistics(NamedTuple):
    """A kind of statistics.

    Attributes:
        log_density: of a point of the chain, which stands for the true statistics.
        start: a first point, and the scale of the noise there.
        factor_of: the moments that a point stands for, given the number of examples.
    """

    log_density: Callable[[Array, Noisy], Array]
    start: Callable[[Noisy], tuple[Array, Array]]
    factor_of: Callable[[Array, Array], Factor]


def draw(
    kind: Statistics,
    values: Float[Array | np.ndarray, " statistics"],
    noise_stddev: float | Array,
    key: PRNGKeyArray,
    prior: Hyperparameters,
    num_examples: int,
    num_samples: int,
) -> tuple[tuple[Array, Array], Array]:
    """Draws coefficients and variances, in units of the bounds; also returns R-hat."""
    numbers = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), tuple(prior))
    noisy = Noisy(
        jnp.asarray(values),
        jnp.asarray(noise_stddev, jnp.float32),
        Hyperparameters(*numbers),
        jnp.asarray(num_examples, jnp.float32),
    )
    chain_key, parameter_key = jax.random.split(key)
    start, scale = kind.start(noisy)
    draws = _hmc.sample(kind.log_density, noisy, start, scale, chain_key, num_samples)
    return _parameters(kind.factor_of, draws.positions, noisy, parameter_key), draws.r_hat


@functools.partial(jax.jit, static_argnums=0)
def _parameters(
    factor_of: Callable[[Array, Array], Factor],
    points: Float[Array, "draws dim"],
    noisy: Noisy,
    key: PRNGKeyArray,
) -> tuple[Array, Array]:
    def one(point: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        return draw_parameters(factor_of(point, noisy.num_examples), noisy.prior, key)

    return jax.vmap(one)(points, jax.random.split(key, len(points)))
