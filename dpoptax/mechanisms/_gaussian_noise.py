"""A sum in, a noisy sum out: independent normal draws for every coordinate.

The draw is float32 or wider whatever the dtype of the parameters. It is a floating-point
Gaussian: its tails end at 6.8 standard deviations in float32, and the attack on its least
significant bits (Mironov 2012) is outside the guarantee.
"""

import math

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax._precision import widen
from dpoptax.random._normal import normal
from dpoptax.random._threefry_unrolled import is_threefry, unrolled

# Leaves of so many numbers or fewer share a draw, where each draw has a price.
MOST_SHARED = 2**16


def add_gaussian(
    key: PRNGKeyArray,
    total: PyTree[Float[Array, "..."]],
    stddev: float | Float[Array, ""],
    *,
    num_draws: int = 1,
) -> PyTree[Float[Array, "..."]]:
    """Adds independent N(0, stddev²) noise to every coordinate of `total`.

    Args:
        key: used once, here; all keys of the draws are split from it.
        total: a tree of float32 or float64 arrays.
        stddev: in the unit of `total`; zero returns `total` as it is.
        num_draws: how many draws make one of that deviation.

    Returns:
        A tree like `total`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> noisy = add_gaussian(jax.random.key(0), {"w": jnp.zeros(10_000)}, stddev=2.0)
        >>> 1.9 < float(noisy["w"].std()) < 2.1
        True
    """
    leaves, treedef = jax.tree.flatten(total)
    if (isinstance(stddev, float) and stddev == 0) or not leaves:
        return total
    wide = [widen(leaf) for leaf in leaves]
    noisy = [
        leaf + jnp.asarray(stddev, leaf.dtype) / math.sqrt(num_draws) * draw
        for leaf, draw in zip(wide, _draws(unrolled(key), wide, num_draws), strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def _draws(key: PRNGKeyArray, leaves: list[Array], num_draws: int) -> list[Array]:
    """An independent draw for each leaf, from a key of its own.

    The rounds of ChaCha20 are a loop of their own for each draw, which costs small leaves more than
    the numbers that they need: these share one draw. Sharded leaves are large, and keep theirs.
    """
    *keys, shared_key = jax.random.split(key, len(leaves) + 1)
    small = {} if is_threefry(key) else {i: leaf for i, leaf in enumerate(leaves) if _small(leaf)}
    flat, unravel = ravel_pytree(small)
    shared = unravel(_sum_of_normals(shared_key, flat, num_draws))
    return [
        shared[i] if i in shared else _sum_of_normals(keys[i], leaf, num_draws)
        for i, leaf in enumerate(leaves)
    ]


def _small(leaf: Array) -> bool:
    return leaf.size <= MOST_SHARED and leaf.dtype == jnp.float32


def _sum_of_normals(key: PRNGKeyArray, like: Array, num_draws: int) -> Array:
    if num_draws == 1:
        return normal(key, like.shape, like.dtype)
    keys = jax.random.split(key, num_draws)

    def add(index: Int[Array, ""] | int, total: Array) -> Array:
        return total + normal(keys[index], like.shape, like.dtype)

    return jax.lax.fori_loop(0, num_draws, add, jnp.zeros_like(like))
