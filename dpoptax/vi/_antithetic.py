"""Antithetic normal draws: pairs of opposite sign, whose mean is exactly zero."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def antithetic_normal(key: PRNGKeyArray, number: int, size: int) -> Float[Array, "draws latents"]:
    """Returns standard normal vectors; the second half is the negated first one."""
    half = jax.random.normal(key, (number // 2, size))
    return jnp.concatenate([half, -half])


def balanced_normal(key: PRNGKeyArray, number: int, size: int) -> Float[Array, "draws latents"]:
    """Returns the same vectors with pairs side by side, so that each even part has mean zero."""
    halves = antithetic_normal(key, number, size).reshape(2, -1, size)
    return jnp.swapaxes(halves, 0, 1).reshape(-1, size)
