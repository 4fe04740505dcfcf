"""Balls in bins: in every round each example takes part in one step, chosen at random."""

import dataclasses
from typing import ClassVar, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import scipy.stats
from dp_accounting import NeighboringRelation
from jaxtyping import Array, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._dp_events import KnownMixtureDpEvent
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers._base import Batch, composed, start
from dpoptax.samplers._poisson import default_capacity
from dpoptax.schedules import Scheduled


class BallsInBinsState(NamedTuple):
    """What the next batch needs.

    Attributes:
        step: the number of the batch.
        key: for sampling and nothing else.
        order: the examples by their step of the round, int32 `(num_examples,)`.
        starts: where in `order` each step begins, int32 `(steps_per_round + 1,)`.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    order: Int[Array, " num_examples"]
    starts: Int[Array, " steps_per_round_and_one"]


@dataclasses.dataclass(frozen=True)
class BallsInBins:
    """Random allocation: each example draws, for each round, the one step in which it takes part.

    Every example is seen once per round, as in shuffled epochs, and independently of the others,
    as in Poisson batches. It is accounted by an upper bound, one Gaussian release per round: the
    amplification that it enjoys has no closed form, and the Poisson curve would be wrong.

    A round's order is drawn at its first step, at the cost of a sort of all examples; every other
    step costs its batch.

    Attributes:
        num_examples: how many examples there are.
        steps_per_round: how many batches share them.
        max_batch_size: the padded size of every batch; None for one that is exceeded with
            probability below 1e-14. Examples beyond it sit out, a uniform random subset of the
            batch. Where one example more would make another sit out, the round is accounted at
            half the noise; a probability of that far below delta is paid from delta instead.

    Raises:
        TypeError: a count that is not whole.
        ValueError: a count out of range.

    Example:
        >>> import jax
        >>> sampler = BallsInBins(num_examples=100, steps_per_round=4)
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0)))
        >>> sampler.expected_batch_size, batch.indices.shape[0] == sampler.max_batch_size
        (25.0, True)

    Reference: Chua et al. 2024, arXiv:2412.16802.
    """

    num_examples: int
    steps_per_round: int
    max_batch_size: int | None = None

    unit: ClassVar[str] = "example"
    relation: ClassVar[str] = "add_or_remove_one"

    def __post_init__(self) -> None:
        num_examples = _validate.num_examples(self.num_examples)
        steps = _validate.count("steps_per_round", self.steps_per_round)
        if steps > num_examples:
            raise ValueError(
                f"steps_per_round cannot exceed num_examples; got {steps} of {num_examples}."
            )
        if num_examples == 2**31:
            raise ValueError("num_examples must be below 2**31 for BallsInBins; got 2**31.")
        capacity = self.max_batch_size
        if capacity is None:
            capacity = default_capacity(num_examples, 1 / steps)
        capacity = min(_validate.count("max_batch_size", capacity), num_examples)
        object.__setattr__(self, "num_examples", num_examples)
        object.__setattr__(self, "steps_per_round", steps)
        object.__setattr__(self, "max_batch_size", capacity)

    @property
    def expected_batch_size(self) -> float:
        """The mean size of a batch."""
        return self.num_examples / self.steps_per_round

    def init(self, key: PRNGKeyArray, step: int = 0) -> BallsInBinsState:
        """Returns the state before batch number `step`.

        `key` must serve sampling and nothing else.
        """
        number, key = start(key, step)
        return BallsInBinsState(number, key, *self._round(key, number))

    def sample(self, state: BallsInBinsState) -> tuple[BallsInBinsState, Batch]:
        """Returns the next state and the next batch of the round."""
        number = state.step % self.steps_per_round
        order, starts = jax.lax.cond(
            number == 0,
            lambda: self._round(state.key, state.step),
            lambda: (state.order, state.starts),
        )
        assert self.max_batch_size is not None  # __post_init__ has filled it in
        slots = jnp.arange(self.max_batch_size, dtype=jnp.int32)
        mask = slots < starts[number + 1] - starts[number]
        indices = order[jnp.where(mask, starts[number] + slots, 0)]
        state = BallsInBinsState(state.step + 1, state.key, order, starts)
        return state, Batch(jnp.where(mask, indices, 0), mask)

    def event(
        self, noise_multiplier: Scheduled, num_steps: int, relation: Relation = "add_or_remove_one"
    ) -> dp_accounting.DpEvent:
        """Returns an upper bound on `num_steps` noisy sums: one Gaussian per round begun.

        Whatever the steps that the others drew, the example is in one batch of the round. It
        moves the sum by the clip bound; where the others fill that batch, one example more makes
        another sit out and moves it by twice that.
        """
        others = scipy.stats.binom(self.num_examples - 1, 1 / self.steps_per_round)
        assert self.max_batch_size is not None  # __post_init__ has filled it in
        full = float(others.sf(self.max_batch_size - 1))
        adds = parse_relation(relation) == NeighboringRelation.ADD_OR_REMOVE_ONE

        def one_round(noise_multiplier: float) -> dp_accounting.DpEvent:
            usual = dp_accounting.GaussianDpEvent(noise_multiplier)
            if full > 0 and adds:
                twice = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
                return KnownMixtureDpEvent(usual, twice, full)
            return usual

        return composed(one_round, noise_multiplier, num_steps, self.steps_per_round)

    def _round(self, key: PRNGKeyArray, step: Array) -> tuple[Array, Array]:
        """Sorts the examples by their step of the round; within a step the order is random."""
        round_key = jax.random.fold_in(key, step // self.steps_per_round)
        step_key, order_key = jax.random.split(round_key)
        shape = (self.num_examples,)
        steps = jax.random.randint(step_key, shape, 0, self.steps_per_round, jnp.int32)
        ties = jax.random.bits(order_key, shape, jnp.uint32)
        names = jnp.arange(self.num_examples, dtype=jnp.int32)
        steps, _, order = jax.lax.sort((steps, ties, names), num_keys=2)
        bounds = jnp.arange(self.steps_per_round + 1, dtype=jnp.int32)
        return order, jnp.searchsorted(steps, bounds).astype(jnp.int32)
