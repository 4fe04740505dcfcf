"""Keys and generators as d3p's scripts pass them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dpoptax import _validate


def as_key(key: Any) -> PRNGKeyArray:
    """Returns a typed key; a key of `jax.random.PRNGKey` becomes the same Threefry key."""
    if not _validate.is_key(key) and jnp.shape(key) == (2,) and key.dtype == jnp.uint32:
        return jax.random.wrap_key_data(key, impl="threefry2x32")
    return key


def check_suite(rng_suite: Any) -> None:
    """Refuses generators other than those of this package."""
    own = ("dpoptax.compat.d3p.random", "dpoptax.compat.d3p.random.debug")
    name = getattr(rng_suite, "__name__", type(rng_suite).__name__)
    if name not in own:
        raise TypeError(
            f"rng_suite must be {own[0]} or its module debug; got {name}. The type of the key "
            "decides which generator draws: leave rng_suite out, and pass a key of d3p.random."
        )
