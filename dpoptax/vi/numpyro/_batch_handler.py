"""Handler of NumPyro messages that lets a model see a batch as its data."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int
from numpyro.primitives import Messenger


class BatchHandler(Messenger):  # type: ignore[misc]
    """Makes the named plates hold the whole batch, and observed columns fit their distribution.

    NumPyro draws its own batch in `plate(name, N, subsample_size=B)`, and expects all N examples
    in `plate(name, N)`. Here the arguments are the batch already.
    """

    def __init__(
        self, fn: Callable[..., Any], plates: frozenset[str], indices: Int[Array, " batch"]
    ) -> None:
        self.plates, self.indices = plates, indices
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["name"] in self.plates:
            msg["args"] = (msg["args"][0], len(self.indices))
            msg["value"] = self.indices
        elif msg["type"] == "sample" and msg["is_observed"]:
            shape = (*msg["fn"].batch_shape, *msg["fn"].event_shape)
            # Labels of shape (N, 1) for a distribution of shape (N,) would broadcast to (N, N).
            if jnp.shape(msg["value"]) == (*shape, 1):
                msg["value"] = jnp.reshape(msg["value"], shape)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        # This handler is outside the plates, so it comes first: the plates take no rows again.
        if msg["type"] == "subsample" and self.plates:
            msg["type"] = "subsampled"
