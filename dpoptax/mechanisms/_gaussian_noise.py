"""Adds normal draws to every coordinate of a sum: independent ones, or functions of several.

The draws are float32 or wider, whatever the dtype of the parameters.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax._precision import widen
from dpoptax._pytree import PyTree
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.random._chacha import rounds_of
from dpoptax.random._chacha_normal import normals
from dpoptax.random._normal import normal
from dpoptax.random._threefry_unrolled import rolled, unrolled


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
    if _is_zero(stddev) or not leaves:
        return tree
    wide, key = _after_sums(leaves, key, jax_random)
    noisy = [
        leaf + jnp.asarray(stddev, leaf.dtype) / math.sqrt(num_draws) * draw
        for leaf, draw in zip(wide, _draws(key, wide, num_draws, jax_random), strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def add_filtered(
    key_of: Callable[[Int[Array, ""] | int], PRNGKeyArray],
    taps: Sequence[float],
    count: Int[Array, ""] | int,
    tree: PyTree[Float[Array, "..."]],
    stddev: float | Float[Array, ""],
    *,
    num_draws: int = 1,
    jax_random: bool = False,
) -> PyTree[Float[Array, "..."]]:
    """Adds stddev * (taps[0] z_0 + taps[1] z_1 + ...), where z_j is drawn from `key_of(j)`.

    Args:
        key_of: the key of each draw.
        taps: the factors.
        count: how many of the terms are added; from 1 to all.
        tree: the sum.
        stddev: as in `add_gaussian`.
        num_draws: as in `add_gaussian`.
        jax_random: as in `add_gaussian`.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if _is_zero(stddev) or not leaves:
        return tree
    if len(taps) == 1:
        options: dict[str, Any] = {"num_draws": num_draws, "jax_random": jax_random}
        return add_gaussian(key_of(0), tree, stddev * taps[0], **options)
    factors = np.asarray(taps, np.float64) / math.sqrt(num_draws)

    def add(index: Int[Array, ""] | int, sums: list[Array]) -> list[Array]:
        key = allowed_key("key", key_of(index))
        key = rolled(key) if jax_random else unrolled(key)
        draws = _draws(key, sums, num_draws, jax_random)
        return [
            leaf + jnp.asarray(stddev, leaf.dtype) * jnp.asarray(factors, leaf.dtype)[index] * draw
            for leaf, draw in zip(sums, draws, strict=True)
        ]

    noisy = [widen(leaf) for leaf in leaves]
    if isinstance(count, jax.core.Tracer):
        # One draw is in memory at a time, and the draw is compiled once.
        noisy = jax.lax.fori_loop(0, count, add, noisy)
    else:  # outside of compiled functions, where each loop would be compiled again
        for index in range(int(count)):
            noisy = add(index, noisy)
    return jax.tree.unflatten(treedef, noisy)


def add_gaussian_by(
    function: Callable[[PyTree], tuple[PyTree, Any]],
    key: PRNGKeyArray,
    tree: PyTree[Float[Array, "..."]],
    stddev: float | Float[Array, ""],
    unchanged: Any,
    *,
    num_draws: int = 1,
    jax_random: bool = False,
) -> tuple[PyTree[Float[Array, "..."]], Any]:
    """Adds stddev times a function of independent N(0, 1) draws in float32 or wider.

    Returns the sum, and what the function returns as well; `unchanged` if nothing is drawn.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if _is_zero(stddev) or not leaves:
        return tree, unchanged
    wide, key = _after_sums(leaves, key, jax_random)
    draws = _draws(key, wide, num_draws, jax_random)
    white = jax.tree.unflatten(treedef, [draw / math.sqrt(num_draws) for draw in draws])
    noise, result = function(white)
    noisy = [
        leaf + jnp.asarray(stddev, leaf.dtype) * part
        for leaf, part in zip(wide, jax.tree.leaves(noise), strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy), result


def _is_zero(stddev: float | Float[Array, ""]) -> bool:
    return isinstance(stddev, float) and stddev == 0


def _after_sums(
    leaves: list[Array], key: PRNGKeyArray, jax_random: bool
) -> tuple[list[Array], PRNGKeyArray]:
    """Returns the leaves in float32 or wider, and the key that the noise is drawn from."""
    key = allowed_key("key", key)
    # Noise that is drawn before the sums are known takes memory while they are computed.
    wide, key = jax.lax.optimization_barrier(([widen(leaf) for leaf in leaves], key))
    return wide, rolled(key) if jax_random else unrolled(key)


def _draws(key: PRNGKeyArray, leaves: list[Array], num_draws: int, jax_random: bool) -> list[Array]:
    """Returns an independent draw for each leaf."""
    if rounds_of(key) is not None and not jax_random:
        return _from_one_stream(key, leaves, num_draws)
    keys = jax.random.split(key, len(leaves))
    return [
        _sum_of_normals(leaf_key, leaf, num_draws, jax_random)
        for leaf_key, leaf in zip(keys, leaves, strict=True)
    ]


def _from_one_stream(key: PRNGKeyArray, leaves: list[Array], num_draws: int) -> list[Array]:
    """Returns a draw for each leaf from a ChaCha key, whose draws have a cost that leaves share."""
    narrow = [leaf.shape for leaf in leaves if leaf.dtype == jnp.float32]

    def draw(key: PRNGKeyArray) -> list[Array]:
        found = iter(normals(key, narrow))
        # Keys of children have other blocks than normals, so no wider leaf shares words with these.
        keys = (
            jax.random.split(key, len(leaves)) if len(narrow) < len(leaves) else [key] * len(leaves)
        )
        return [
            next(found) if leaf.dtype == jnp.float32 else normal(own, leaf.shape, leaf.dtype)
            for own, leaf in zip(keys, leaves, strict=True)
        ]

    if num_draws == 1:
        return draw(key)
    keys = jax.random.split(key, num_draws)

    def add(index: Int[Array, ""] | int, totals: list[Array]) -> list[Array]:
        return [total + one for total, one in zip(totals, draw(keys[index]), strict=True)]

    return jax.lax.fori_loop(0, num_draws, add, [jnp.zeros_like(leaf) for leaf in leaves])


def _sum_of_normals(key: PRNGKeyArray, like: Array, num_draws: int, jax_random: bool) -> Array:
    draw = jax.random.normal if jax_random else normal
    if num_draws == 1:
        return draw(key, like.shape, like.dtype)
    keys = jax.random.split(key, num_draws)

    def add(index: Int[Array, ""] | int, total: Array) -> Array:
        return total + draw(keys[index], like.shape, like.dtype)

    return jax.lax.fori_loop(0, num_draws, add, jnp.zeros_like(like))
