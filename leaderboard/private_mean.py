"""The private mean of some rows. Centred rows make shorter gradients, which need less noise."""

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


def spent_with(event: dp_accounting.DpEvent, plan: dpoptax.Plan) -> float:
    """Returns the epsilon of a plan and an earlier event together, at the delta of the plan."""
    both = dp_accounting.ComposedDpEvent([event, plan.event()])
    return dpoptax.accounting.event_epsilon(both, delta=plan.delta)
