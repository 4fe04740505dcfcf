"""A sum in, a noisy sum out: independent normal draws for every coordinate.

The draw is float32 or wider whatever the dtype of the parameters. It is a floating-point
Gaussian: its tails end at 6.8 standard deviations in float32, and the attack on its least
significant bits (Mironov 2012) is outside the guarantee.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax.precision import widen
from dpoptax.random.box_muller import normal
from dpoptax.random.threefry import written_out


def add_gaussian(
    key: PRNGKeyArray,
    total: PyTree[Float[Array, "..."]],
    stddev: float | Float[Array, ""],
    *,
    num_normals: int = 1,
) -> PyTree[Float[Array, "..."]]:
    """Adds independent N(0, stddev²) noise to every coordinate of `total`.

    Args:
        key: used once, here; each leaf draws from a key of its own, split from it.
        total: a tree of float32 or float64 arrays.
        stddev: in the unit of `total`; zero returns `total` as it is.
        num_normals: how many draws make one of that deviation.

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
    keys = jax.random.split(written_out(key), len(leaves))
    noisy = []
    for leaf_key, leaf in zip(keys, leaves, strict=True):
        wide = widen(leaf)
        share = jnp.asarray(stddev, wide.dtype) / math.sqrt(num_normals)
        noisy.append(wide + share * _sum_of_normals(leaf_key, wide, num_normals))
    return jax.tree.unflatten(treedef, noisy)


def _sum_of_normals(key: PRNGKeyArray, like: Array, num_normals: int) -> Array:
    if num_normals == 1:
        return normal(key, like.shape, like.dtype)
    keys = jax.random.split(key, num_normals)

    def add(index: Int[Array, ""] | int, total: Array) -> Array:
        return total + normal(keys[index], like.shape, like.dtype)

    return jax.lax.fori_loop(0, num_normals, add, jnp.zeros_like(like))
