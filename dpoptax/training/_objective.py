"""Interface of an objective that is more than the loss of one example.

Some objectives take their gradient at another point than the parameters, or add a gradient that
needs no privacy. Both belong to the objective, so every training loop does them.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree


@runtime_checkable
class Objective(Protocol):
    """What a train step needs from an objective; `dpoptax.vi.global_elbo` returns one.

    Example:
        >>> from dpoptax import vi
        >>> log_likelihood = lambda mean, x: -0.5 * (x - mean) ** 2
        >>> elbo = vi.global_elbo(vi.guides.MeanField(0.0), log_likelihood, num_examples=9)
        >>> isinstance(elbo, Objective)  # so `fit` takes it in place of a loss
        True
    """

    def loss(self, point: PyTree, example: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """Returns the loss of one example; its gradient at `point` is clipped and noised."""

    def gradient_point(self, params: PyTree, opt_state: Any) -> PyTree:
        """Returns where the gradients of this step are taken."""

    def wrap(
        self, private: optax.GradientTransformation, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Extends the private gradient of `loss` to the gradient of the whole objective.

        What it adds may depend on the parameters and on `key` only, never on the data.
        """


def split_objective(
    loss_fn: Callable[..., Any] | Objective,
) -> tuple[Callable[..., Any], Callable[[PyTree, Any], PyTree]]:
    """Returns the loss of one example, and where its gradient is taken for params and opt_state."""
    if isinstance(loss_fn, Objective):
        return loss_fn.loss, loss_fn.gradient_point
    return loss_fn, lambda params, opt_state: params
