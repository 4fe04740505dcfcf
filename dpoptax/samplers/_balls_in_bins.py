"""Balls-in-bins sampling: each example takes part in one random step of every round."""

import attrs
import dp_accounting
import jax
import jax.numpy as jnp
from dp_accounting import NeighboringRelation
from jaxtyping import Array, PRNGKeyArray

from dpoptax import _validate
from dpoptax._dp_events import (
    TruncatedRandomAllocationDpEvent,
    compose_passes,
    random_allocation_event,
)
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._patterns import OncePerRound
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers._binomial import default_max_batch_size
from dpoptax.samplers._participation import Participation
from dpoptax.samplers._rounds import RoundSampler
from dpoptax.samplers._sorted import sort_by_place
from dpoptax.schedules import ScalarOrSchedule


@attrs.frozen(init=False)
class BallsInBins(RoundSampler):
    """Random allocation: in each round, each example draws the one step in which it takes part.

    Every example is seen once per round, as in shuffled epochs, and independently of the others,
    as in Poisson batches. Its privacy loss is computed numerically, as a certified upper bound.

    The order of a round is drawn at the first step of the round and costs a sort of all examples.
    Every other step costs as much as its batch.

    Attributes:
        num_examples: how many examples there are.
        steps_per_round: how many batches they are distributed over.
        max_batch_size: the padded size of every batch; None in the constructor for a size that is
            exceeded with probability below 1e-14. Further examples sit out: the batch is cut to a
            uniform random subset. Where one example more would make another one sit out, it moves
            the sum by twice the clip bound. The accountant includes this.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: a count is out of range.

    Example:
        >>> import jax
        >>> sampler = BallsInBins(num_examples=100, steps_per_round=4)
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0)))
        >>> sampler.expected_batch_size, batch.indices.shape[0] == sampler.max_batch_size
        (25.0, True)

    Reference: Chua et al. 2024, arXiv:2412.16802, for the sampler; Feldman and Shenfeld 2025,
    arXiv:2502.08202, for its privacy.
    """

    num_examples: int
    steps_per_round: int
    max_batch_size: int

    @answer_foreign_names
    def __init__(
        self, num_examples: int, steps_per_round: int, max_batch_size: int | None = None
    ) -> None:
        num_examples = _validate.num_examples(num_examples)
        steps = _validate.count("steps_per_round", steps_per_round)
        if steps > num_examples:
            raise ValueError(
                f"steps_per_round cannot exceed num_examples; got {steps} of {num_examples}. "
                "Pass num_examples // batch_size."
            )
        if max_batch_size is None:
            max_batch_size = default_max_batch_size(num_examples, 1 / steps)
        largest = min(_validate.count("max_batch_size", max_batch_size), num_examples)
        self.__attrs_init__(num_examples, steps, largest)

    @property
    def expected_batch_size(self) -> float:
        """The mean size of a batch."""
        return self.num_examples / self.steps_per_round

    def resized(self, max_batch_size: int | None) -> "BallsInBins":
        """See `Sampler.resized`."""
        return BallsInBins(self.num_examples, self.steps_per_round, max_batch_size)

    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums: one random allocation per round begun.

        The example is in one batch of the round, and nobody knows which. A round that is cut short,
        or whose noise grows, costs no more than a whole round at its smallest noise.
        """
        adds = parse_relation(relation or self.relation) == NeighboringRelation.ADD_OR_REMOVE_ONE

        def one_round(noise_multiplier: float) -> dp_accounting.DpEvent:
            truncated = TruncatedRandomAllocationDpEvent(
                self.num_examples, self.steps_per_round, self.max_batch_size, noise_multiplier
            )
            # Under the other relations both neighbours fill the same batches.
            if adds and self.max_batch_size < self.num_examples:
                return truncated
            return random_allocation_event(self.steps_per_round, noise_multiplier)

        return compose_passes(one_round, noise_multiplier, num_steps, self.steps_per_round)

    def participation(self, num_steps: int) -> Participation:
        """See `Sampler.participation`: once per round, with the last and the next first step."""
        rounds = -(-num_steps // self.steps_per_round)
        truncated = TruncatedRandomAllocationDpEvent(
            self.num_examples, self.steps_per_round, self.max_batch_size, 1.0
        )
        # Its step of a round does not depend on who fills the batches.
        crowded = min(rounds * truncated.probability_of_full(), 1.0)
        pattern = OncePerRound(self.steps_per_round)
        return Participation(pattern, rounds, crowded=crowded)

    def _round(self, key: PRNGKeyArray, step: Array) -> tuple[Array, Array]:
        """Draws the `order` and `starts` of the round that contains `step`."""
        key = allowed_key("the key of a sampler state", key)
        round_key = jax.random.fold_in(key, step // self.steps_per_round)
        step_key, order_key = jax.random.split(round_key)
        shape = (self.num_examples,)
        steps = jax.random.randint(step_key, shape, 0, self.steps_per_round, jnp.int32)
        examples = jnp.arange(self.num_examples, dtype=jnp.int32)
        return sort_by_place(order_key, steps, examples, self.steps_per_round)
