"""A private gradient of a likelihood in, that of an ELBO out: the divergence is added after noise.

It depends on parameters that every release before has made public, and so costs no privacy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax import _validate

# `kl(params, key)`, a scalar on the scale of all examples together.
Divergence = Callable[[PyTree, PRNGKeyArray], Float[Array, ""]]


class DivergenceState(NamedTuple):
    """The state of what makes the gradient private, and what the divergence draws from."""

    inner: Any
    step: Int[Array, ""]
    key: PRNGKeyArray


class AtTheParameters:
    """An `Objective` whose gradients are taken at the parameters, and its divergence added."""

    num_examples: int
    num_samples: int
    kl_clipped: bool

    def kl(self, psi: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """Returns the divergence from the prior, of parameters and a key alone."""
        raise NotImplementedError

    def point(self, params: PyTree, opt_state: Any) -> PyTree:
        """The parameters themselves; see `Objective.point`."""
        del opt_state
        return params

    def around(
        self, private: optax.GradientTransformation, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Adds the gradient of the divergence after the noise; see `Objective.around`."""
        if self.kl_clipped:
            return private
        return plus_divergence(private, self.kl, self.num_examples, key)

    def _mean(self, one: Callable[[PRNGKeyArray], Array], key: PRNGKeyArray) -> Array:
        """The mean of `one` over as many keys as there are samples."""
        if self.num_samples == 1:
            return one(key)
        return jnp.mean(jax.vmap(one)(jax.random.split(key, self.num_samples)))


def plus_divergence(
    private: optax.GradientTransformation, kl: Divergence, num_examples: int, key: PRNGKeyArray
) -> optax.GradientTransformation:
    """Returns `private` with the gradient of `kl / num_examples` added to its updates.

    Args:
        private: from per-example gradients to one private gradient.
        kl: of parameters and a key alone.
        num_examples: a public constant.
        key: used for nothing else.

    Returns:
        A transformation whose update needs the parameters.
    """
    key = _validate.typed_key("key", key)

    def init(params: PyTree) -> DivergenceState:
        return DivergenceState(private.init(params), jnp.zeros((), jnp.int32), key)

    def update(
        updates: Any, state: DivergenceState, params: Any = None
    ) -> tuple[PyTree, DivergenceState]:
        params = required(params)
        noisy, inner = private.update(updates, state.inner, params)
        step_key = jax.random.fold_in(state.key, state.step)
        total = plus_gradient(noisy, kl, num_examples, params, step_key)
        return total, DivergenceState(inner, state.step + 1, state.key)

    return optax.GradientTransformation(init, update)


def plus_gradient(
    gradient: PyTree, kl: Divergence, num_examples: int, params: PyTree, key: PRNGKeyArray
) -> PyTree:
    """Adds the gradient of `kl / num_examples` at `params`.

    Args:
        gradient: a tree like the parameters.
        kl: as in `plus_divergence`.
        num_examples: as in `plus_divergence`.
        params: where.
        key: of this step.

    Returns:
        A tree like the parameters.
    """
    pull = jax.grad(kl)(params, key)
    return jax.tree.map(lambda g, p: g + (p / num_examples).astype(g.dtype), gradient, pull)


def required(params: Any) -> PyTree:
    """Returns the parameters; refuses their absence.

    Args:
        params: of an update.

    Returns:
        The same.

    Raises:
        ValueError: they were not passed.
    """
    if params is None:
        raise ValueError(
            "this update depends on the parameters: call tx.update(grads, state, params)."
        )
    return params
