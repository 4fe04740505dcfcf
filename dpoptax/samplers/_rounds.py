"""Base class of samplers that draw the order of all examples once per round of steps."""

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from dpoptax.samplers._base import Batch, Sampler, padded_batch


class RoundState(NamedTuple):
    """What the next batch needs.

    Attributes:
        step: the number of the next batch, int32.
        key: the sampling key; the same in every step.
        order: the examples sorted by their step of the round, int32 `(rows,)`.
        starts: the position in `order` where each step begins, int32 `(steps_per_round + 1,)`.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    order: Int[Array, " rows"]
    starts: Int[Array, " steps_per_round_and_one"]


class RoundSampler(Sampler):
    """Base class of samplers with rounds of `steps_per_round` steps, whose batches may be cut.

    Its first step draws a round, by `_round`. Every other step only reads its batch.
    """

    steps_per_round: int

    @abc.abstractmethod
    def _round(self, key: PRNGKeyArray, step: Array) -> tuple[Array, Array]:
        """Draws the `order` and `starts` of the round that contains `step`."""

    def init(self, key: PRNGKeyArray, step: int = 0) -> RoundState:
        """Returns the state before batch number `step`; see `Sampler.init`."""
        # Not super(): attrs replaces the class by one with slots, and a decorated method (the
        # type checker of the tests decorates it) would still refer to the first one.
        number, key = Sampler.init(self, key, step)
        return RoundState(number, key, *self._round(key, number))

    def sample(self, state: RoundState) -> tuple[RoundState, Batch]:
        """Returns the next state and the next batch of the round."""
        number = state.step % self.steps_per_round
        order, starts = jax.lax.cond(
            number == 0,
            lambda: self._round(state.key, state.step),
            lambda: (state.order, state.starts),
        )
        slots = jnp.arange(self.max_batch_size, dtype=jnp.int32)
        mask = slots < starts[number + 1] - starts[number]
        indices = order[jnp.where(mask, starts[number] + slots, 0)]
        state = RoundState(state.step + 1, state.key, order, starts)
        return state, padded_batch(indices, mask, self.num_examples)
