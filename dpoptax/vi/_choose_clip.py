"""Choice of a clip bound for calibrated intervals, from simulated data only.

Noise grows with the bound, and the bias of clipping shrinks with it. Both are known for simulated
examples at latents that are drawn from the prior. Of the bounds with a small bias, the one that is
returned has the narrowest intervals on average, where the variance of an interval is

    sampling error + noise of all steps + batches + bias**2
"""

import math
from typing import NamedTuple

import attrs
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key, PRNGKeyArray

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax.vi._aligned_elbo import AlignedElbo
from dpoptax.vi._latents import DrawLatents, prior_sampler
from dpoptax.vi._local_model import LocalModel, Simulate, Simulation, gradients_at, simulated_model
from dpoptax.vi._noise_level import noise_level

_NUM_SIMULATED = 1000
# Quantiles of the gradient norms that are tried as clip bounds. Lower ones rely on the simulation
# too much: clipping then decides where the optimum is.
_QUANTILES = (0.9, 0.95, 0.975, 0.99, 0.995, 1.0)


# Directions with a smaller part of the largest slope are left to the prior.
_NO_SLOPE = 1e-3
# In standard deviations of the posterior.
_LARGEST_BIAS = 0.5


@attrs.frozen
class ClipChoice:
    """A clip bound, and what to expect of it; `choose_clip` returns it. It is public.

    Attributes:
        clip: the bound.
        clipped_fraction: the fraction of simulated examples whose gradients it scales down.
        clip_bias: the bias of the latents in standard deviations of the posterior: the largest
            latent, averaged over draws from the prior.
        privacy_ratio: the expected width of intervals over that without privacy.
    """

    clip: float
    clipped_fraction: float
    clip_bias: float
    privacy_ratio: float

    @property
    def statement(self) -> str:
        """The choice in one sentence."""
        return (
            f"Clip at {self.clip:.3g}: {self.clipped_fraction:.1%} of simulated examples are "
            f"clipped, the bias is {self.clip_bias:.2f} posterior standard deviations, and "
            f"intervals are about {self.privacy_ratio:.2f} times as wide as without privacy."
        )


def choose_clip(
    elbo: AlignedElbo,
    plan: Plan,
    simulate: Simulate,
    *,
    draw_latents: DrawLatents | None = None,
    num_worlds: int = 32,
    key: PRNGKeyArray,
) -> ClipChoice:
    """Chooses the clip bound of a plan from simulated data, so it costs no privacy.

    Args:
        elbo: an objective of `aligned_elbo`.
        plan: a plan with any clip bound: its noise multiplier does not depend on it.
        simulate: as in `calibrated_posterior`. If real covariates are larger than these, more
            examples are clipped than the choice says.
        draw_latents: as in `calibration_check`.
        num_worlds: how many draws from the prior to average over.
        key: a key for the simulation. It needs no secrecy.

    Returns:
        A `ClipChoice`; use `plan.replace(clip=choice.clip)`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as in `calibrated_posterior`.

    Example:
        >>> import jax, jax.numpy as jnp, dpoptax
        >>> guide = dpoptax.vi.guides.MeanField(jnp.zeros(()))
        >>> elbo = dpoptax.vi.aligned_elbo(
        ...     guide, lambda mean, x: -0.5 * (x - mean) ** 2, num_examples=200
        ... )
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 50),
        ...     clip=1.0, noise_multiplier=4.0, num_steps=100, delta=1e-4,
        ... )
        >>> choice = choose_clip(
        ...     elbo, plan, lambda key, mean: mean + jax.random.normal(key), key=jax.random.key(0)
        ... )
        >>> 1.5 < choice.clip < 4.0  # the norms are those of a standard normal
        True
        >>> plan = plan.replace(clip=choice.clip)
    """
    noise = noise_level(plan, elbo.num_examples)
    draw = prior_sampler(elbo, draw_latents)
    num_worlds = _validate.count("num_worlds", num_worlds)
    keys = jax.random.split(_validate.typed_key("key", key), num_worlds)
    _, unravel = ravel_pytree(draw(keys[0]))
    # The noise per unit of the bound, of the mean over all steps.
    per_clip = noise.stddev / noise.l2_clip / math.sqrt(plan.num_steps)
    per_batch = noise.batch / plan.num_steps

    def norms(key: PRNGKeyArray) -> Array:
        latents = draw(key)
        example_keys = jax.random.split(key, _NUM_SIMULATED)
        examples = jax.vmap(simulate, in_axes=(0, None))(example_keys, latents)
        flat = ravel_pytree(latents)[0]
        gradients = gradients_at(elbo.log_likelihood, unravel, flat, examples, example_keys)
        return jnp.linalg.norm(gradients, axis=1)

    def outcome(clip: Array, key: PRNGKeyArray) -> _Outcome:
        flat = ravel_pytree(draw(key))[0]
        simulation = Simulation(elbo.log_likelihood, unravel, simulate, clip, key)
        local = simulated_model(simulation, flat, jnp.tile(flat, (_NUM_SIMULATED, 1)))
        return _outcome(local, clip * per_clip, per_batch, elbo.num_examples)

    @jax.jit
    def compare(keys: Key[Array, " worlds"]) -> tuple[Array, _Outcome]:
        clips = jnp.quantile(jax.lax.map(norms, keys), jnp.asarray(_QUANTILES))
        each = jax.lax.map(lambda clip: jax.lax.map(lambda key: outcome(clip, key), keys), clips)
        return clips, jax.tree.map(lambda leaf: leaf.mean(1), each)

    clips, outcomes = compare(keys)
    # Rather noise than bias: a correction for a large bias would rest on the simulation alone.
    allowed = (outcomes.bias <= _LARGEST_BIAS).at[-1].set(True)
    best = int(jnp.argmin(jnp.where(allowed, outcomes.ratio, jnp.inf)))
    return ClipChoice(
        clip=float(clips[best]),
        clipped_fraction=float(outcomes.clipped_fraction[best]),
        clip_bias=float(outcomes.bias[best]),
        privacy_ratio=math.exp(float(outcomes.ratio[best])),
    )


class _Outcome(NamedTuple):
    """What a clip bound does in one world, for each direction in which the likelihood has slope."""

    ratio: Array
    bias: Array
    clipped_fraction: Array


def _outcome(local: LocalModel, stddev: Array, per_batch: float, num_examples: int) -> _Outcome:
    """Returns the mean log of the widening, and the largest bias in standard deviations."""
    slope, vectors = jnp.linalg.eigh(local.slope)
    known = slope > _NO_SLOPE * slope[-1]
    slope = jnp.where(known, slope, 1)

    def along(matrix: Array) -> Array:
        return jnp.einsum("ij,ik,kj->j", vectors, matrix, vectors)

    sampling = 1 / (num_examples * jnp.where(known, along(local.curvature), 1))
    noise = (stddev**2 + per_batch * along(local.second_moment)) / slope**2
    bias = jnp.where(known, vectors.T @ local.bias / slope, 0)
    log_ratio = jnp.log((sampling + noise + bias**2) / sampling) / 2
    return _Outcome(
        ratio=jnp.sum(jnp.where(known, log_ratio, 0)) / jnp.sum(known, dtype=slope.dtype),
        bias=jnp.max(jnp.abs(bias) / jnp.sqrt(sampling + noise)),
        clipped_fraction=local.clipped_fraction,
    )
