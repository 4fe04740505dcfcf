"""Examples sorted by the step or the group that they belong to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray


def sort_by_place(
    key: PRNGKeyArray,
    places: Int[Array, " rows"],
    examples: Int[Array, " rows"],
    num_places: int,
) -> tuple[Int[Array, " rows"], Int[Array, " places_and_one"]]:
    """Returns the examples in the order of their places, and where each place begins.

    Within a place the order is random: cutting a batch must keep a uniform subset. Places of
    num_places and above come last.
    """
    ties = jax.random.bits(key, places.shape, jnp.uint32)
    places, _, order = jax.lax.sort((places, ties, examples), num_keys=2)
    bounds = jnp.arange(num_places + 1, dtype=jnp.int32)
    return order, jnp.searchsorted(places, bounds).astype(jnp.int32)
