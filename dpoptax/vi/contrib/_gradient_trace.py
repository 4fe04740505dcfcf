"""Noise-aware posterior: corrects a trained guide for the noise, from a trace of its gradients.

The scale of a privately trained guide is the uncertainty that the data leave about the latents. It
does not include how far the noise has moved the location from its optimum. Near the optimum phi*
the gradient of step t is

    g_t = A (phi_t - phi*) + noise_t,   A = (N covariance)^-1 for a normal guide

So every step of the trace measures phi* as phi_t - A^-1 g_t, with independent noise. The mean of
the measurements is a better location, and its covariance widens the guide. The correction is only
as good as the covariance of the guide: choose a clip bound that is rarely reached, and train with
aligned gradients. All of it is post-processing of released values.

Reference: Alrawajfeh, Jälkö and Honkela 2024, arXiv:2410.19371, infer a posterior over phi* from
the trace. Here the guide's own precision takes the place of their estimate of A.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.transforms._private import require_params
from dpoptax.vi.contrib._families import family_of


class TraceState(NamedTuple):
    """The number of updates so far, and a ring buffer of the last locations and gradients."""

    step: Int[Array, ""]
    traced_locations: Float[Array, "steps latents"]
    traced_gradients: Float[Array, "steps latents"]


def trace_gradients(num_steps: int, guide: Any = None) -> optax.GradientTransformation:
    """Keeps the last locations of a guide and the gradients there; changes no update.

    Put it between `elbo.wrap(private, key)` and the optimizer. With `DPSVI` or `fit` write
    `optax.chain(trace_gradients(500, guide), optax.adam(1e-2))`.

    Args:
        num_steps: number of last steps to keep. The parameters should have settled by then.
        guide: of NumPyro, `AutoNormal`, `AutoDiagonalNormal`, `AutoMultivariateNormal` or
            `AutoLowRankMultivariateNormal`. None for `dpoptax.vi.guides.MeanField`.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        TypeError: a number that is not whole, or a guide of another kind.
        ValueError: a number below 2.

    Example:
        >>> import jax.numpy as jnp
        >>> guide_params = {"loc": jnp.zeros(3), "raw_scale": jnp.zeros(3)}
        >>> trace_gradients(100).init(guide_params).traced_gradients.shape
        (100, 3)

    Reference: Alrawajfeh, Jälkö and Honkela 2024, arXiv:2410.19371.
    """
    length = _validate.count("num_steps", num_steps, at_least=2)
    family = family_of(guide)

    def init(params: PyTree) -> TraceState:
        size = family.vector(params).size
        return TraceState(
            jnp.zeros((), jnp.int32), jnp.zeros((length, size)), jnp.zeros((length, size))
        )

    def update(updates: PyTree, state: TraceState, params: Any = None) -> tuple[PyTree, TraceState]:
        row = state.step % length
        location = family.vector(require_params(params))
        gradient = family.vector(updates)
        return updates, TraceState(
            state.step + 1,
            state.traced_locations.at[row].set(location),
            state.traced_gradients.at[row].set(gradient),
        )

    return optax.GradientTransformation(init, update)


def noise_aware_posterior(
    guide_params: PyTree, opt_state: Any, *, num_examples: int, guide: Any = None
) -> PyTree:
    """Returns a guide that is corrected for the noise, and widened by the remaining error.

    Args:
        guide_params: trained parameters of the guide on the real line, as `fit` returns them.
        opt_state: the state of a chain with `trace_gradients`, after at least as many steps as that
            keeps.
        num_examples: N, a public constant.
        guide: as in `trace_gradients`.

    Returns:
        Parameters of the same guide.

    Raises:
        TypeError: a guide of another kind.
        KeyError: the chain has no `trace_gradients`.
        ValueError: fewer steps ran than `trace_gradients` keeps.

    Example:
        >>> import jax.numpy as jnp
        >>> guide_params = {"loc": jnp.zeros(1), "raw_scale": jnp.zeros(1)}
        >>> tx = trace_gradients(2)
        >>> state = tx.init(guide_params)
        >>> for gradient in (-0.1, 0.3):
        ...     _, state = tx.update({"loc": jnp.full(1, gradient)}, state, guide_params)
        >>> aware = noise_aware_posterior(guide_params, state, num_examples=10)
        >>> bool(aware["raw_scale"][0] > guide_params["raw_scale"][0]), bool(aware["loc"][0] < 0)
        (True, True)

    Reference: Alrawajfeh, Jälkö and Honkela 2024, arXiv:2410.19371.
    """
    locations = optax.tree_utils.tree_get(opt_state, "traced_locations")
    if locations is None:
        raise KeyError(
            "this optimizer state holds no trace. Put trace_gradients(num_steps) between "
            "elbo.wrap(private, key) and the optimizer."
        )
    gradients = optax.tree_utils.tree_get(opt_state, "traced_gradients")
    # Rows that no step has written are zero; a noisy gradient never is.
    unused = int(jnp.sum(jnp.all(gradients == 0, axis=1)))
    if unused:
        raise ValueError(
            f"the trace keeps {len(locations)} steps, and {unused} of them were not run. Train for "
            "longer, or keep fewer."
        )
    family, count = family_of(guide), _validate.num_examples(num_examples)
    # phi_t - A^-1 g_t, with A^-1 = N covariance.
    measured = locations - count * family.times_covariance(guide_params, gradients)
    errors = measured - measured.mean(axis=0)
    covariance_of_mean = errors.T @ errors / (len(measured) * (len(measured) - 1))
    return family.moved(guide_params, measured.mean(axis=0), covariance_of_mean)
