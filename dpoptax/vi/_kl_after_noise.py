"""KL after the noise: adds the gradient of the divergence to a gradient that is private already.

The divergence of the guide from the prior depends on the guide's parameters alone. Every earlier
release has made these public, so its gradient is added unclipped and costs no privacy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.transforms._private import PrivateTransformation, require_params, stddev_of

# `kl(guide_params, key)`, a scalar for all examples together: not divided by their number.
Divergence = Callable[[PyTree, PRNGKeyArray], Float[Array, ""]]


class KlAfterNoiseState(NamedTuple):
    """The state of the private transformation, and what the draws of the divergence need."""

    inner: Any
    step: Int[Array, ""]
    key: PRNGKeyArray


def add_kl_after_noise(
    private: optax.GradientTransformation, kl: Divergence, num_examples: int, key: PRNGKeyArray
) -> optax.GradientTransformation:
    """Returns `private` with the gradient of `kl / num_examples` added to its updates."""
    key = _validate.typed_key("key", key)

    def init(params: PyTree) -> KlAfterNoiseState:
        return KlAfterNoiseState(private.init(params), jnp.zeros((), jnp.int32), key)

    def update(
        updates: Any, state: KlAfterNoiseState, params: Any = None, **extra_args: Any
    ) -> tuple[PyTree, KlAfterNoiseState]:
        del extra_args
        params = require_params(params)
        noisy, inner = private.update(updates, state.inner, params)
        # New draws in every step, for a divergence that is estimated.
        step_key = jax.random.fold_in(state.key, state.step)
        with_kl = add_kl_gradient(noisy, kl, num_examples, params, step_key)
        return with_kl, KlAfterNoiseState(inner, state.step + 1, state.key)

    def noise_stddev(state: KlAfterNoiseState, params: PyTree) -> PyTree | None:
        return stddev_of(private, state.inner, params)

    return PrivateTransformation(init, update, noise_stddev=noise_stddev)


def add_kl_gradient(
    gradient: PyTree, kl: Divergence, num_examples: int, params: PyTree, key: PRNGKeyArray
) -> PyTree:
    """Adds the gradient of `kl / num_examples` at `params`."""
    kl_gradient = jax.grad(kl)(params, key)
    return jax.tree.map(lambda g, k: g + (k / num_examples).astype(g.dtype), gradient, kl_gradient)
