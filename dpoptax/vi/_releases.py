"""The releases of a run with aligned gradients: where gradients were taken, and what was released.

Both are public. The points follow from the public parameters and from draws that do not depend on
data, and the gradients are the noisy ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from dpoptax._pytree import PyTree


class Releases(NamedTuple):
    """The last releases of a run, in a ring buffer. Latents are one flat vector.

    Attributes:
        num_released: how many steps have released something; the buffer holds the last of them.
        points: the latents at which the gradients of each step were taken, one row per draw.
        noisy_gradients: the mean gradient of the negative log-likelihood there, with its noise.
    """

    num_released: Int[Array, ""]
    points: Float[Array, "steps draws latents"]
    noisy_gradients: Float[Array, "steps draws latents"]


def no_releases(keep_steps: int, draws: tuple[PyTree, ...]) -> Releases | None:
    """Returns an empty buffer for draws like these; None if nothing is to be kept."""
    if not keep_steps:
        return None
    zeros = jnp.zeros((keep_steps, len(draws), ravel_pytree(draws[0])[0].size), jnp.float32)
    return Releases(jnp.zeros((), jnp.int32), zeros, zeros)


def with_release(
    releases: Releases | None, draws: tuple[PyTree, ...], gradients: tuple[PyTree, ...]
) -> Releases | None:
    """Returns the buffer with one more step in it."""
    if releases is None:
        return None
    row = releases.num_released % len(releases.points)
    point, gradient = (
        jnp.stack([ravel_pytree(one)[0] for one in of_draws]).astype(jnp.float32)
        for of_draws in (draws, gradients)
    )
    return Releases(
        releases.num_released + 1,
        releases.points.at[row].set(point),
        releases.noisy_gradients.at[row].set(gradient),
    )


def releases_of(opt_state: Any) -> Releases:
    """Returns the releases that a state holds; refuses a state that keeps none, or too few."""
    found = optax.tree_utils.tree_get(opt_state, "releases")
    if not isinstance(found, Releases):
        raise KeyError(
            "this optimizer state holds no releases. Make the objective by "
            "aligned_elbo(..., keep_steps=...), and pass result.state.opt_state."
        )
    if not isinstance(found.num_released, jax.core.Tracer) and found.num_released < len(
        found.points
    ):
        raise ValueError(
            f"keep_steps is {len(found.points)}, but only {int(found.num_released)} steps ran. "
            "Train for longer, or keep fewer."
        )
    return found
