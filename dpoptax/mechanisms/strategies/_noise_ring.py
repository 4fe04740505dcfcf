"""Recursion for noise under a strategy with few bands.

`C y = z` has, for the noise y of a step and its independent draw z, the solution

    y_t = (z_t - sum_{j >= 1} C[t, t - j] y_{t - j}) / C[t, t].

The last `num_bands - 1` noises are kept, each in the place of its step modulo their number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._pytree import PyTree


class NoiseRing(NamedTuple):
    """The noises of the last steps.

    Attributes:
        noises: like the noise, with a leading axis of `num_bands - 1`. Zero before the first step.
    """

    noises: PyTree[Float[Array, "..."]]


def empty_ring(like: PyTree[Float[Array, "..."]], size: int) -> NoiseRing:
    """Returns the state before the first step."""
    return NoiseRing(
        jax.tree.map(lambda leaf: jnp.zeros((size, *jnp.shape(leaf)), leaf.dtype), like)
    )


def next_noise(
    white: PyTree[Float[Array, "..."]],
    ring: NoiseRing,
    step: Int[Array, ""],
    row: Float[Array, " bands"],
) -> tuple[PyTree[Float[Array, "..."]], NoiseRing]:
    """Returns the noise of a step and the next state.

    Args:
        white: the independent draws of this step.
        ring: the state.
        step: the number of the step.
        row: `C[t, t - j]` for j from zero on; the first is not zero.
    """
    size = len(row) - 1
    if size == 0:
        return jax.tree.map(lambda leaf: leaf / row[0].astype(leaf.dtype), white), ring
    # The place i holds the noise of the last step that is i modulo the size.
    ages = jnp.mod(step - 1 - jnp.arange(size), size) + 1
    weights = row[ages]

    def solve(leaf: Array, noises: Array) -> Array:
        earlier = jnp.tensordot(
            weights.astype(leaf.dtype), noises, axes=1, precision=jax.lax.Precision.HIGHEST
        )
        return (leaf - earlier) / row[0].astype(leaf.dtype)

    def store(noises: Array, noise: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(noises, noise, jnp.mod(step, size), 0)

    noise = jax.tree.map(solve, white, ring.noises)
    return noise, NoiseRing(jax.tree.map(store, ring.noises, noise))
