"""Hamiltonian Monte Carlo for a small smooth density: whitened at the mode, several chains.

The densities here are close to normal after whitening. So chains that start around the mode, with a
step size that is tuned for all of them together, mix in a few trajectories.

Reference: Neal 2011, "MCMC using Hamiltonian dynamics"; Vehtari et al. 2021, arXiv:1903.08008, for
the split R-hat.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

NUM_CHAINS = 8
NUM_WARMUP = 150  # per chain and phase; there are two phases
NUM_LEAPFROG = 6
NEWTON_STEPS = 40
TARGET_ACCEPTANCE = 0.85
# A trajectory of this length in whitened space is about a half turn of a normal density.
LONGEST_STEP = 0.5

LogDensity = Callable[[Float[Array, " dim"]], Float[Array, ""]]


class Draws(NamedTuple):
    """Draws of several chains, one after the other, and the largest split R-hat of a coordinate."""

    positions: Float[Array, "draws dim"]
    r_hat: Float[Array, ""]


class _Chains(NamedTuple):
    positions: Float[Array, "chains dim"]
    log_step: Float[Array, ""]


def sample(
    log_density: LogDensity, start: Float[Array, " dim"], key: PRNGKeyArray, num_samples: int
) -> Draws:
    """Draws from a density, starting from a point where it is finite.

    Args:
        log_density: up to a constant. It may be NaN where the density is zero.
        start: where the search for the mode begins.
        key: for these draws.
        num_samples: how many draws to return.
    """
    mode = _find_mode(log_density, start)
    scale = _whitening(jax.hessian(lambda point: -log_density(point))(mode))
    first, second, third, around = jax.random.split(key, 4)
    white = 0.5 * jax.random.normal(around, (NUM_CHAINS, len(start)))
    chains = _Chains(white, jnp.asarray(math.log(0.25)))
    chains, trace = _run(log_density, mode, scale, chains, first, NUM_WARMUP, tune=True)
    # The second phase is whitened by the draws of the first, which see more than the curvature at
    # the mode if the noise is large.
    settled = mode + jnp.einsum("ij,ncj->nci", scale, trace[NUM_WARMUP // 3 :])
    settled = settled.reshape(-1, len(start))
    centre = jnp.mean(settled, axis=0)
    spread = _root_covariance(settled - centre)
    white = jax.scipy.linalg.solve_triangular(
        spread, (mode + chains.positions @ scale.T - centre).T, lower=True
    ).T
    chains = _Chains(white, chains.log_step)
    chains, _ = _run(log_density, centre, spread, chains, second, NUM_WARMUP, tune=True)
    length = -(-num_samples // NUM_CHAINS)
    _, trace = _run(log_density, centre, spread, chains, third, length, tune=False)
    positions = (centre + jnp.einsum("ij,ncj->nci", spread, trace)).swapaxes(0, 1)
    flat = positions.reshape(-1, len(start))
    # Every chain gives its share: a stride through all of them, and not the first ones.
    keep = jnp.arange(num_samples) * len(flat) // num_samples
    return Draws(flat[keep], split_r_hat(positions))


def split_r_hat(positions: Float[Array, "chains length dim"]) -> Float[Array, ""]:
    """Returns the largest split R-hat: the spread between half chains over that within them."""
    half = positions.shape[1] // 2
    if half < 2:
        return jnp.asarray(jnp.nan)
    parts = jnp.concatenate([positions[:, :half], positions[:, half : 2 * half]])
    within = jnp.mean(jnp.var(parts, axis=1, ddof=1), axis=0)
    between = jnp.var(jnp.mean(parts, axis=1), axis=0, ddof=1)
    return jnp.max(jnp.sqrt((half - 1) / half + between / within))


def _find_mode(log_density: LogDensity, start: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """Newton's method with a damping that grows after steps that do not improve."""
    gradient, hessian = jax.grad(log_density), jax.hessian(log_density)

    def improve(_: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        point, damping = carry
        values, vectors = jnp.linalg.eigh(-hessian(point))
        rotated = vectors.T @ gradient(point) / (jnp.abs(values) + damping)
        proposal = point + vectors @ rotated
        better = log_density(proposal) > log_density(point)  # False for NaN
        point = jnp.where(better, proposal, point)
        return point, jnp.where(better, damping / 10, damping * 10)

    damping = jnp.asarray(1.0)
    return jax.lax.fori_loop(0, NEWTON_STEPS, improve, (start, damping))[0]


def _whitening(hessian: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    values, vectors = jnp.linalg.eigh(hessian)
    return vectors / jnp.sqrt(jnp.maximum(jnp.abs(values), 1e-3))


def _root_covariance(centred: Float[Array, "draws dim"]) -> Float[Array, "dim dim"]:
    covariance = centred.T @ centred / len(centred)
    # A little of the diagonal keeps the factor regular, whatever the draws are.
    ridge = 1e-2 * jnp.diag(jnp.diagonal(covariance)) + 1e-12 * jnp.eye(centred.shape[1])
    return jnp.linalg.cholesky(covariance + ridge)


def _run(
    log_density: LogDensity,
    centre: Array,
    scale: Array,
    chains: _Chains,
    key: PRNGKeyArray,
    length: int,
    *,
    tune: bool,
) -> tuple[_Chains, Array]:
    """Runs all chains in whitened coordinates; returns them, and their positions over time."""

    def energy(white: Array) -> Array:
        value = -log_density(centre + scale @ white)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    force = jax.vmap(jax.grad(energy))
    energies = jax.vmap(energy)

    def move(carry: _Chains, inputs: tuple[Array, Array]) -> tuple[_Chains, Array]:
        turn, turn_key = inputs
        momentum_key, jitter_key, accept_key = jax.random.split(turn_key, 3)
        momentum = jax.random.normal(momentum_key, carry.positions.shape)
        # Trajectories of one length may be periodic.
        step = jnp.exp(carry.log_step) * jax.random.uniform(jitter_key, minval=0.6, maxval=1.2)

        def leap(_: Array | int, state: tuple[Array, Array]) -> tuple[Array, Array]:
            position, speed = state
            position = position + step * speed
            return position, speed - step * force(position)

        speed = momentum - step / 2 * force(carry.positions)
        moved, speed = jax.lax.fori_loop(0, NUM_LEAPFROG, leap, (carry.positions, speed))
        speed = speed + step / 2 * force(moved)  # the last kick was a whole one
        gained = energies(carry.positions) - energies(moved)
        gained = gained + jnp.sum(momentum**2 - speed**2, axis=1) / 2
        probability = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(gained), -jnp.inf, gained), 0.0))
        accepted = jax.random.uniform(accept_key, probability.shape) < probability
        positions = jnp.where(accepted[:, None], moved, carry.positions)
        log_step = carry.log_step
        if tune:
            change = (jnp.mean(probability) - TARGET_ACCEPTANCE) / jnp.sqrt(turn + 1.0)
            log_step = jnp.minimum(log_step + change, math.log(LONGEST_STEP))
        return _Chains(positions, log_step), positions

    turns = (jnp.arange(length), jax.random.split(key, length))
    return jax.lax.scan(move, chains, turns)
