"""Noisy gradients and where they were taken in, a posterior that knows of the noise out.

A guide that was trained privately says how uncertain the data leave the latents, and not how far
the noise has carried it from where it would be. Near the optimum phi* the gradient of step t is

    g_t = A (phi_t - phi*) + noise_t,   A = 1 / (N scale**2) for a mean field,

so every step of the trace measures phi* as phi_t - g_t / A, with noise that is independent from
step to step. The mean of the measurements is a better location, and its variance widens the scale.
It is as good as the scale is right: clip seldom and train by aligned gradients. All of it is
post-processing of what was released.

Reference: Alrawajfeh, Jälkö and Honkela 2024, arXiv:2410.19371, for the idea of a posterior over
phi* from the trace; the guide's own precision stands for their A.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from dpoptax import _validate
from dpoptax.vi._kl_after_noise import required


class TraceState(NamedTuple):
    """How many updates there were, and the locations and gradients of the last of them."""

    step: Int[Array, ""]
    traced_locations: Float[Array, "steps latents"]
    traced_gradients: Float[Array, "steps latents"]


def trace_gradients(num_steps: int) -> optax.GradientTransformation:
    """Keeps the last locations of a guide and the gradients there; changes no update.

    Put it between `elbo.around(private, key)` and the optimizer.

    Args:
        num_steps: how many to keep: those at the end, where the parameters have settled.

    Returns:
        An `optax.GradientTransformation` for parameters with a location under "loc".

    Raises:
        TypeError: a number that is not whole.
        ValueError: a number below 2.

    Example:
        >>> import jax.numpy as jnp
        >>> psi = {"loc": jnp.zeros(3), "raw_scale": jnp.zeros(3)}
        >>> trace_gradients(100).init(psi).traced_gradients.shape
        (100, 3)

    Reference: Alrawajfeh, Jälkö and Honkela 2024, arXiv:2410.19371.
    """
    length = _validate.count("num_steps", num_steps, at_least=2)

    def init(params: PyTree) -> TraceState:
        size = ravel_pytree(params["loc"])[0].size
        return TraceState(
            jnp.zeros((), jnp.int32), jnp.zeros((length, size)), jnp.zeros((length, size))
        )

    def update(updates: PyTree, state: TraceState, params: Any = None) -> tuple[PyTree, TraceState]:
        place = state.step % length
        location, gradient = (ravel_pytree(tree["loc"])[0] for tree in (required(params), updates))
        return updates, TraceState(
            state.step + 1,
            state.traced_locations.at[place].set(location),
            state.traced_gradients.at[place].set(gradient),
        )

    return optax.GradientTransformation(init, update)


def noise_aware_posterior(psi: PyTree, opt_state: Any, *, num_examples: int) -> PyTree:
    """Returns a mean field moved to where its trace points, and as wide as that is uncertain.

    Args:
        psi: trained parameters of `dpoptax.vi.guides.MeanField`.
        opt_state: the state of a chain with `trace_gradients`, which has been filled.
        num_examples: N, a public constant.

    Returns:
        Parameters of the same guide.

    Raises:
        KeyError: `trace_gradients` is no part of the chain.
        ValueError: fewer steps than it keeps.

    Example:
        >>> import jax.numpy as jnp
        >>> psi = {"loc": jnp.zeros(1), "raw_scale": jnp.zeros(1)}
        >>> tx = trace_gradients(2)
        >>> state = tx.init(psi)
        >>> for gradient in (-0.1, 0.3):
        ...     _, state = tx.update({"loc": jnp.full(1, gradient)}, state, psi)
        >>> found = noise_aware_posterior(psi, state, num_examples=10)
        >>> bool(found["raw_scale"][0] > psi["raw_scale"][0]), bool(found["loc"][0] < 0)
        (True, True)

    Reference: Alrawajfeh, Jälkö and Honkela 2024, arXiv:2410.19371.
    """
    locations = optax.tree_utils.tree_get(opt_state, "traced_locations")
    if locations is None:
        raise KeyError("no part of this state is of trace_gradients.")
    gradients = optax.tree_utils.tree_get(opt_state, "traced_gradients")
    unused = int(jnp.sum(jnp.all(gradients == 0, axis=1)))
    if unused:
        raise ValueError(
            f"the trace keeps {len(locations)} steps, and {unused} of them were not run. Train for "
            "longer, or keep less."
        )
    scale = jax.nn.softplus(psi["raw_scale"])
    measured = locations - gradients * (_validate.num_examples(num_examples) * scale**2)
    uncertain = jnp.var(measured, axis=0, ddof=1) / len(measured)
    wide = jnp.sqrt(scale**2 + uncertain)
    _, unravel = ravel_pytree(psi["loc"])
    return {
        "loc": unravel(measured.mean(axis=0)),
        # The inverse of softplus, without overflow.
        "raw_scale": wide + jnp.log(-jnp.expm1(-wide)),
    }
