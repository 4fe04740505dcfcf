"""What a training step asks of an objective that is more than the loss of one example.

Some objectives take their gradients at another point than the parameters, or add a gradient that
needs no privacy. They say so here, once, so that no loop can forget it.
"""

from typing import Any, Protocol, runtime_checkable

import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


@runtime_checkable
class Objective(Protocol):
    """An objective in three parts; `dpoptax.vi.global_elbo` makes one."""

    def loss(self, point: PyTree, example: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of one example, whose gradient by `point` is clipped and noised."""

    def gradient_point(self, params: PyTree, opt_state: Any) -> PyTree:
        """Where the gradients of this step are taken, from the state of the transformation."""

    def wrap(
        self, private: optax.GradientTransformation, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Returns the gradient of the whole objective from that of `loss`, made private.

        What it adds must depend on the parameters and on `key` alone.
        """
