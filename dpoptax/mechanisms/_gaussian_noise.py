"""Adds independent normal draws to every coordinate of a sum.

The draws are float32 or wider, whatever the dtype of the parameters.
"""

import math

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax._precision import widen
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.random._normal import normal
from dpoptax.random._threefry_unrolled import is_threefry, rolled, unrolled

# Leaves of up to 65,536 numbers share one ChaCha20 draw: 4,096 blocks, for which the fixed cost of
# a draw still matters. Larger leaves are worth a draw each, and may be sharded.
MAX_SHARED = 2**16


def add_gaussian(
    key: PRNGKeyArray,
    tree: PyTree[Float[Array, "..."]],
    stddev: float | Float[Array, ""],
    *,
    num_draws: int = 1,
    jax_random: bool = False,
) -> PyTree[Float[Array, "..."]]:
    """Adds N(0, stddev²) noise to every coordinate; a `stddev` of 0.0 returns `tree` as it is.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> noisy = add_gaussian(jax.random.key(0), {"w": jnp.zeros(10_000)}, stddev=2.0)
        >>> 1.9 < float(noisy["w"].std()) < 2.1
        True
    """
    leaves, treedef = jax.tree.flatten(tree)
    if (isinstance(stddev, float) and stddev == 0) or not leaves:
        return tree
    key = allowed_key("key", key)
    # Noise that is drawn before the sums are known takes memory while they are computed.
    wide, key = jax.lax.optimization_barrier(([widen(leaf) for leaf in leaves], key))
    key = rolled(key) if jax_random else unrolled(key)
    noisy = [
        leaf + jnp.asarray(stddev, leaf.dtype) / math.sqrt(num_draws) * draw
        for leaf, draw in zip(wide, _draws(key, wide, num_draws, jax_random), strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def _draws(key: PRNGKeyArray, leaves: list[Array], num_draws: int, jax_random: bool) -> list[Array]:
    """Returns an independent draw for each leaf."""
    *keys, shared_key = jax.random.split(key, len(leaves) + 1)
    # The rounds of ChaCha20 are a loop per draw, which costs a small leaf more than its numbers do.
    # So small leaves share one draw. Threefry has no such cost.
    small = {} if is_threefry(key) else {i: leaf for i, leaf in enumerate(leaves) if _small(leaf)}
    flat, unravel = ravel_pytree(small)
    shared = unravel(_sum_of_normals(shared_key, flat, num_draws, jax_random))
    return [
        shared[i] if i in shared else _sum_of_normals(keys[i], leaf, num_draws, jax_random)
        for i, leaf in enumerate(leaves)
    ]


def _small(leaf: Array) -> bool:
    return leaf.size <= MAX_SHARED and leaf.dtype == jnp.float32


def _sum_of_normals(key: PRNGKeyArray, like: Array, num_draws: int, jax_random: bool) -> Array:
    draw = jax.random.normal if jax_random else normal
    if num_draws == 1:
        return draw(key, like.shape, like.dtype)
    keys = jax.random.split(key, num_draws)

    def add(index: Int[Array, ""] | int, total: Array) -> Array:
        return total + draw(keys[index], like.shape, like.dtype)

    return jax.lax.fori_loop(0, num_draws, add, jnp.zeros_like(like))
