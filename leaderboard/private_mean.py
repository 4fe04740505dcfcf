"""The private mean of some rows. Centred rows make shorter gradients, which need less noise.

The mean of one-hot codes also says how rare each is. Scaled rows then share the noise more evenly.
"""

from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import optax

import dpoptax
from leaderboard.recipe import finished


def private_mean(
    rows: Any, l2_clip: float, noise_multiplier: float, delta: float, key: jax.Array
) -> tuple[jax.Array, dp_accounting.DpEvent]:
    """Releases the mean of rows by one Gaussian mechanism.

    Args:
        rows: `(num_examples, size)`.
        l2_clip: longer rows are clipped to this norm.
        noise_multiplier: of the noise on the sum.
        delta: of the plan.
        key: for the noise.

    Returns:
        The mean, float32 `(size,)`, and the event, which the run must add to that of its training.
    """
    count, size = rows.shape
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(count, count),
        clip=l2_clip,
        noise_multiplier=noise_multiplier,
        num_steps=1,
        delta=delta,
    )
    result = dpoptax.training.fit(
        lambda mean, row: -mean @ row.astype(jnp.float32),
        jnp.zeros(size),
        rows,
        plan=plan,
        optimizer=optax.sgd(1.0),
        key=key,
        microbatch_size=5000,
        progress=False,
    )
    return finished(result).params, plan.event()


def scale_of_codes(mean: jax.Array) -> jax.Array:
    """Returns factors for one-hot codes, from the released mean of their rows.

    The mean is the frequency of each code, and so gives its variance. Codes with a small variance
    are scaled up, and the mean squared norm of centred rows stays as it is. Every number of a
    gradient gets the same noise, so the weights of rare codes get less noise than without a scale.

    Args:
        mean: `(size,)`, as `private_mean` returns it.
    """
    # The floor is for codes that are hardly ever one, or zero; their frequencies are mostly noise.
    variance = jnp.maximum(mean * (1 - mean), 0.01)
    # Between no scale and unit variance, which is the power -1/2. Held-out rows chose it.
    scale = variance**-0.375
    return scale * jnp.sqrt(variance.sum() / (scale**2 * variance).sum())


def spent_with(event: dp_accounting.DpEvent, plan: dpoptax.Plan) -> float:
    """Returns the epsilon of a plan and an earlier event together, at the delta of the plan."""
    both = dp_accounting.ComposedDpEvent([event, plan.event()])
    return dpoptax.accounting.event_epsilon(both, delta=plan.delta)
