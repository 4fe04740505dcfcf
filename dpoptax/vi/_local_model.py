"""A local model of the mean gradient: its slope, its curvature and what clipping does to it.

Near a centre c the clipped mean gradient of the negative log-likelihood is about
gradient + slope (latents - c) + what the data say. The numbers come from simulated examples, or
from the precision of the guide. Neither touches data.

Each example is simulated with latents from a normal distribution around the centre, not at the
centre. The expected gradient then contains the second-order effect of latents that are uncertain,
as in a hierarchical model, where groups shrink together. This is statistical linearisation.

Reference: García-Fernández, Svensson, Morelande and Särkkä 2015, "Posterior linearization filter".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi._elbo_terms import LogLikelihood, negative_log_likelihood

# Steps whose gradients are computed at the same time.
_STEPS_AT_ONCE = 16
# `simulate(key, latents)` returns one example as the model would produce it, without any data.
Simulate = Callable[[PRNGKeyArray, PyTree], PyTree]


class Simulation(NamedTuple):
    """How examples are simulated, and clipped.

    Attributes:
        log_likelihood: of one example given the latents.
        unravel: from one flat vector to the latents.
        simulate: returns one example, from a key and the latents.
        l2_clip: the clip bound.
        key: of the examples.
    """

    log_likelihood: LogLikelihood
    unravel: Callable[[Array], PyTree]
    simulate: Simulate
    l2_clip: float | Float[Array, ""]
    key: PRNGKeyArray


class LocalModel(NamedTuple):
    """What one example contributes on average, at one point.

    Attributes:
        curvature: the mean Hessian of the negative log-likelihood.
        slope: the derivative of the mean clipped gradient; the curvature if nothing is clipped.
        second_moment: the mean of g g^T over clipped gradients g.
        gradient: the mean clipped gradient. Without clipping and uncertainty it is zero.
        bias: the part of it that comes from clipping.
        clipped_fraction: the fraction of examples with a gradient above the bound.
        change: the mean clipped gradient at each point of a run, minus that at the centre; None if
            it was not computed.
    """

    curvature: Float[Array, "latents latents"]
    slope: Float[Array, "latents latents"]
    second_moment: Float[Array, "latents latents"]
    gradient: Float[Array, " latents"]
    bias: Float[Array, " latents"]
    clipped_fraction: Float[Array, ""]
    change: Float[Array, "steps draws latents"] | None = None


def gradients_at(
    log_likelihood: LogLikelihood,
    unravel: Callable[[Array], PyTree],
    flat_latents: Float[Array, " latents"] | Float[Array, "examples latents"],
    examples: PyTree,
    keys: Key[Array, " examples"],
) -> Float[Array, "examples latents"]:
    """Returns the gradients of negative log-likelihoods, at one point or at one for each."""

    def loss(flat: Array, example: PyTree, key: PRNGKeyArray) -> Array:
        return negative_log_likelihood(log_likelihood, unravel(flat), example, key)

    axis = None if flat_latents.ndim == 1 else 0
    found: Array = jax.vmap(jax.grad(loss), in_axes=(axis, 0, 0))(flat_latents, examples, keys)
    return found


def clipped(
    gradients: Float[Array, "examples latents"], l2_clip: float | Float[Array, ""]
) -> Float[Array, "examples latents"]:
    """Returns the gradients of examples, scaled down to norm `l2_clip`."""
    squared = jnp.sum(gradients**2, axis=1, keepdims=True)
    # The maximum before the root keeps the derivative finite at a gradient of zero.
    return gradients * (l2_clip / jnp.sqrt(jnp.maximum(squared, l2_clip**2)))


def simulated_model(
    simulation: Simulation,
    centre: Float[Array, " latents"],
    latents: Float[Array, "examples latents"],
) -> LocalModel:
    """Returns the local model at the centre, without `change`.

    Args:
        simulation: how to simulate.
        centre: where gradients are taken.
        latents: those of each example. Their mean is the centre.
    """
    log_likelihood, unravel, _, l2_clip, _ = simulation
    examples, keys = _simulated(simulation, latents)

    def mean_gradients(flat: Array) -> tuple[Array, Array]:
        gradients = gradients_at(log_likelihood, unravel, flat, examples, keys)
        return gradients.mean(0), clipped(gradients, l2_clip).mean(0)

    curvature, slope = jax.jacfwd(mean_gradients)(centre)
    gradients = gradients_at(log_likelihood, unravel, centre, examples, keys)
    within = clipped(gradients, l2_clip)
    # Gradients at the latents of the example itself have mean zero. To subtract them takes most of
    # the noise of the simulation away.
    own = gradients_at(log_likelihood, unravel, latents, examples, keys)
    return LocalModel(
        curvature=_symmetric(curvature),
        slope=_symmetric(slope),
        second_moment=within.T @ within / len(latents),
        gradient=(within - own).mean(0),
        bias=(within - gradients).mean(0),
        clipped_fraction=jnp.mean(jnp.sum(gradients**2, axis=1) > l2_clip**2),
    )


def with_simulated_change(
    local: LocalModel,
    simulation: Simulation,
    centre: Float[Array, " latents"],
    latents: Float[Array, "examples latents"],
    points: Float[Array, "steps draws latents"],
) -> LocalModel:
    """Returns the model with `change`: what is not linear in it needs fewer examples."""
    log_likelihood, unravel, _, l2_clip, _ = simulation
    examples, keys = _simulated(simulation, latents)

    def mean_gradient(flat: Array) -> Array:
        gradients = gradients_at(log_likelihood, unravel, flat, examples, keys)
        return clipped(gradients, l2_clip).mean(0)

    at_points = jax.lax.map(jax.vmap(mean_gradient), points, batch_size=_STEPS_AT_ONCE)
    # The slope of these examples is replaced by that of the larger number.
    slope = local.slope - jax.jacfwd(mean_gradient)(centre)
    change = at_points - mean_gradient(centre) + (points - centre) @ slope.T
    return local._replace(change=change)


def _simulated(
    simulation: Simulation, latents: Float[Array, "examples latents"]
) -> tuple[PyTree, Key[Array, " examples"]]:
    keys = jax.random.split(simulation.key, len(latents))
    simulate_at = lambda key, flat: simulation.simulate(key, simulation.unravel(flat))  # noqa: E731
    return jax.vmap(simulate_at)(keys, latents), keys


def model_of_precision(
    precision: Float[Array, "latents latents"],
    num_examples: int,
    centre: Float[Array, " latents"],
    points: Float[Array, "steps draws latents"],
) -> LocalModel:
    """Returns the local model in which a precision of the likelihood is right, and no clip bites.

    The second moment of gradients is the curvature (Bartlett's identity).
    """
    values, vectors = jnp.linalg.eigh(_symmetric(precision) / num_examples)
    curvature = (vectors * jnp.maximum(values, 0)) @ vectors.T
    zero = jnp.zeros(len(precision))
    change = (points - centre) @ curvature
    return LocalModel(curvature, curvature, curvature, zero, zero, jnp.zeros(()), change)


def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.T) / 2
