"""The gradient of the log posterior, from the private gradient of the loss of one example.

    ∇ log p(θ | x) ≈ ∇ log p(θ) - N g,  g = private mean gradient of -log p(x_i | θ)

The noise of the release is known: each coordinate of N g has the standard deviation
N noise_multiplier l2_clip / expected_batch_size. The noise of drawing a batch is not.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.clipping import ClipRule, StatefulClipRule
from dpoptax.mechanisms import StatefulMechanism
from dpoptax.transforms._private import released_noise_stddev
from dpoptax.vi._elbo_terms import Prior, checked_prior


def check_plan(plan: Plan) -> None:
    """Raises unless the noise of each step is independent, and known before the run."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a dpoptax.Plan; got a {type(plan).__name__}.")
    if isinstance(plan.clip, StatefulClipRule) or isinstance(plan.mechanism, StatefulMechanism):
        raise ValueError(
            "the noise of a private gradient is a part of the noise of the chain, so it must be "
            "independent, and known before the run; got a plan with "
            f"{type(plan.clip).__name__} and {type(plan.mechanism).__name__}. Pass a plan with a "
            "fixed clip and independent noise."
        )


def gradient_noise_stddev(plan: Plan, step: Int[Array, ""] | int) -> Any:
    """Returns the standard deviation of the privacy noise in the gradient of the log posterior."""
    # `check_plan` refused a rule with state.
    released = released_noise_stddev(
        cast(ClipRule, plan.clip), plan.noise_multiplier, plan.sampler.expected_batch_size, step
    )
    return plan.sampler.num_examples * released


def log_posterior_gradient(
    gradient: PyTree, position: PyTree, prior: Prior, num_examples: int
) -> PyTree:
    """Returns the gradient of the log posterior, from the gradient of the mean loss."""
    of_prior = prior_gradient(prior, position)
    return jax.tree.map(
        lambda private, known: known - jnp.asarray(num_examples, private.dtype) * private,
        *(gradient, of_prior),
    )


def prior_gradient(prior: Prior, position: PyTree) -> PyTree:
    """Returns the gradient of the log prior; a number is the scale of a normal one."""
    prior = checked_prior(prior)
    if callable(prior):
        return jax.grad(prior)(position)
    return jax.tree.map(lambda leaf: -leaf / prior**2, position)


def moves(new: PyTree, old: PyTree) -> optax.Updates:
    """Returns what Optax adds to the old position to get the new one."""
    return jax.tree.map(lambda after, before: (after - before).astype(before.dtype), new, old)


def negative(log_likelihood: Any, prior: Prior) -> Any:
    """Returns the loss of one example; refuses a likelihood that needs a key."""
    checked_prior(prior)

    def loss(position: PyTree, example: PyTree) -> Float[Array, ""]:
        return -log_likelihood(position, example)

    return loss
