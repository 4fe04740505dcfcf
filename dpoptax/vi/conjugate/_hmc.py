"""Hamiltonian Monte Carlo for a small smooth density: several chains, and two phases of tuning.

The densities here are close to normal in suitable coordinates. So chains with a common step size
and the covariance of the first phase mix in a few trajectories.

Reference: Neal 2011, "MCMC using Hamiltonian dynamics"; Vehtari et al. 2021, arXiv:1903.08008, for
the split R-hat.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

NUM_CHAINS = 8
LENGTH = 128  # of a phase, which is compiled once
NUM_LEAPFROG = 6
TARGET_ACCEPTANCE = 0.85
FIRST_STEP, LARGEST_STEP = 0.1, 0.5
# What chains that have met stay below (Vehtari et al. ask for 1.01 in published results).
LARGEST_R_HAT = 1.05

# `log_density(point, data)`, up to a constant. It may be NaN where the density is zero.
LogDensity = Callable[[Array, Any], Float[Array, ""]]


class Draws(NamedTuple):
    """Draws of several chains, one after the other, and the largest split R-hat of a coordinate."""

    positions: Float[Array, "draws dim"]
    r_hat: Float[Array, ""]


class _Chains(NamedTuple):
    positions: Float[Array, "chains dim"]
    log_step: Float[Array, ""]


def sample(
    log_density: LogDensity,
    data: Any,
    start: Float[Array, " dim"],
    scale: Float[Array, "dim dim"],
    key: PRNGKeyArray,
    num_samples: int,
) -> Draws:
    """Draws from a density.

    Args:
        log_density: a function of a module, so that it is compiled once.
        data: what it depends on, a tree of arrays.
        start: a point of high density.
        scale: a root of the covariance, roughly.
        key: for these draws.
        num_samples: how many draws to return.
    """
    num_phases = -(-num_samples // (NUM_CHAINS * LENGTH))
    around, first, second, *others = jax.random.split(key, 3 + num_phases)
    positions = start + 0.3 * jax.random.normal(around, (NUM_CHAINS, len(start))) @ scale.T
    chains = _Chains(positions, jnp.asarray(math.log(FIRST_STEP), jnp.float32))
    chains, trace = _run(log_density, data, scale, chains, first, 1.0)
    scale = _root_covariance(trace[LENGTH // 2 :].reshape(-1, len(start)))
    chains, trace = _run(log_density, data, scale, chains, second, 1.0)
    scale = _root_covariance(trace[LENGTH // 4 :].reshape(-1, len(start)))
    traces = []
    for phase_key in others:
        chains, trace = _run(log_density, data, scale, chains, phase_key, 0.0)
        traces.append(trace)
    positions = jnp.concatenate(traces).swapaxes(0, 1)
    flat = positions.reshape(-1, len(start))
    # A stride through all chains, and not the first of them.
    keep = jnp.arange(num_samples) * len(flat) // num_samples
    return Draws(flat[keep], split_r_hat(positions))


def split_r_hat(positions: Float[Array, "chains length dim"]) -> Float[Array, ""]:
    """Returns the largest split R-hat: the spread of all half chains over that within them."""
    half = positions.shape[1] // 2
    parts = jnp.concatenate([positions[:, :half], positions[:, half : 2 * half]])
    within = jnp.mean(jnp.var(parts, axis=1, ddof=1), axis=0)
    between = jnp.var(jnp.mean(parts, axis=1), axis=0, ddof=1)
    return jnp.max(jnp.sqrt((half - 1) / half + between / within))


def warn_of_r_hat(r_hat: Float[Array, ""]) -> None:
    """Warns if chains did not agree; says nothing about draws that are traced."""
    if not isinstance(r_hat, jax.core.Tracer) and float(r_hat) > LARGEST_R_HAT:
        warnings.warn(
            f"the chains of the posterior did not agree: split R-hat is {float(r_hat):.2f}, and "
            f"should be below {LARGEST_R_HAT}. Draw more samples.",
            RuntimeWarning,
            stacklevel=3,
        )


@jax.jit
def _root_covariance(draws: Float[Array, "draws dim"]) -> Float[Array, "dim dim"]:
    centred = draws - jnp.mean(draws, axis=0)
    covariance = jnp.matmul(centred.T, centred, precision="highest") / len(draws)
    # A little of the diagonal keeps the factor regular, whatever the draws are.
    variances = jnp.diagonal(covariance)
    return jnp.linalg.cholesky(covariance + jnp.diag(0.01 * variances + 1e-20))


@functools.partial(jax.jit, static_argnums=0)
def _run(
    log_density: LogDensity,
    data: Any,
    scale: Float[Array, "dim dim"],
    chains: _Chains,
    key: PRNGKeyArray,
    tuning: float | Float[Array, ""],
) -> tuple[_Chains, Float[Array, "length chains dim"]]:
    """Runs all chains for a phase; returns them, and their positions over time.

    Speeds are in units of `scale`, so that one step size fits all directions.
    """

    def energy(position: Array) -> Array:
        value = -log_density(position, data)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    slopes = jax.vmap(jax.value_and_grad(energy))

    def move(
        carry: tuple[Array, Array, Array, Array], inputs: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array, Array, Array], Array]:
        position, energy_now, slope, log_step = carry
        turn, turn_key = inputs
        momentum_key, jitter_key, accept_key = jax.random.split(turn_key, 3)
        momentum = jax.random.normal(momentum_key, position.shape)
        # Trajectories of one length may be periodic.
        step = jnp.exp(log_step) * jax.random.uniform(jitter_key, minval=0.6, maxval=1.2)

        def leap(_: Array | int, state: tuple[Array, ...]) -> tuple[Array, ...]:
            position, speed, _, slope = state
            speed = speed - step / 2 * (slope @ scale)
            position = position + step * (speed @ scale.T)
            new_energy, slope = slopes(position)
            return position, speed - step / 2 * (slope @ scale), new_energy, slope

        state = (position, momentum, energy_now, slope)
        moved, speed, new_energy, new_slope = jax.lax.fori_loop(0, NUM_LEAPFROG, leap, state)
        gained = energy_now - new_energy + jnp.sum(momentum**2 - speed**2, axis=1) / 2
        probability = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(gained), -jnp.inf, gained), 0.0))
        accepted = jax.random.uniform(accept_key, probability.shape) < probability
        position = jnp.where(accepted[:, None], moved, position)
        slope = jnp.where(accepted[:, None], new_slope, slope)
        energy_now = jnp.where(accepted, new_energy, energy_now)
        change = (jnp.mean(probability) - TARGET_ACCEPTANCE) / jnp.sqrt(turn + 1.0)
        log_step = jnp.minimum(log_step + tuning * change, math.log(LARGEST_STEP))
        return (position, energy_now, slope, log_step), position

    start = (chains.positions, *slopes(chains.positions), chains.log_step)
    turns = (jnp.arange(LENGTH, dtype=jnp.float32), jax.random.split(key, LENGTH))
    (positions, _, _, log_step), trace = jax.lax.scan(move, start, turns)
    return _Chains(positions, log_step), trace
