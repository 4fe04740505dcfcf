"""Min-separated sampling: an example that took part waits for some steps before the next time."""

import attrs
import dp_accounting
import jax
import jax.numpy as jnp
from dp_accounting import NeighboringRelation
from jaxtyping import Array, PRNGKeyArray

from dpoptax import _validate
from dpoptax._dp_events import KnownBranchDpEvent, random_allocation_event
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._patterns import Separated
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers._binomial import default_max_batch_size
from dpoptax.samplers._participation import Participation
from dpoptax.samplers._rounds import RoundSampler
from dpoptax.samplers._sorted import sort_by_place
from dpoptax.schedules import ScalarOrSchedule, as_schedule


@attrs.frozen(init=False)
class MinSeparated(RoundSampler):
    """Random rounds of each example, with at least `min_separation` steps between two of its turns.

    Every example has rounds of `steps_per_round` steps, which begin at a random step. In each
    of its rounds it takes part once, in one of the first `steps_per_round - min_separation + 1`
    steps, which it draws again in every round. So batches have the same mean
    size in every step, and each example takes part independently of the others. Separated turns
    lower the sensitivity to noise that is correlated between steps.

    With `min_separation=1` this is much like `BallsInBins`. With `min_separation=steps_per_round`
    an example takes part in every `steps_per_round`-th step. In between, epsilon is that of one
    random allocation to `steps_per_round - min_separation + 1` steps for each round of the example,
    as if it were known when its rounds begin.

    The order of a round is drawn at the first step of the round and costs a sort of twice as many
    rows as examples. Every other step costs as much as its batch.

    Attributes:
        num_examples: how many examples there are.
        steps_per_round: how many steps a round has; the mean number of steps between two turns.
        min_separation: the least number of steps from one turn to the next.
        max_batch_size: the padded size of every batch. A larger batch is cut to a uniform random
            subset, so that one example more may displace another one. Epsilon is that of half the
            noise, unless this is so rare in the whole run that delta pays for it.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: a count is out of range.

    Example:
        >>> import jax
        >>> sampler = MinSeparated(num_examples=100, steps_per_round=5, min_separation=3)
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0)))
        >>> sampler.expected_batch_size, sampler.participation(num_steps=13).max_count
        (20.0, 3)

    Reference: Choquette-Choo et al. 2023, arXiv:2306.08153, for the pattern; Feldman and Shenfeld
    2025, arXiv:2502.08202, for the privacy of a round.
    """

    num_examples: int
    steps_per_round: int
    min_separation: int
    max_batch_size: int

    @answer_foreign_names
    def __init__(
        self,
        num_examples: int,
        steps_per_round: int,
        min_separation: int,
        max_batch_size: int | None = None,
    ) -> None:
        num_examples = _validate.num_examples(num_examples)
        steps = _validate.count("steps_per_round", steps_per_round)
        separation = _validate.count("min_separation", min_separation)
        if steps > num_examples:
            raise ValueError(
                f"steps_per_round cannot exceed num_examples; got {steps} of {num_examples}. "
                "Pass num_examples // batch_size."
            )
        if separation > steps:
            raise ValueError(
                f"min_separation cannot exceed steps_per_round; got {separation} and {steps}. An "
                "example takes part once in so many steps: pass more steps, or less separation."
            )
        if max_batch_size is None:
            max_batch_size = default_max_batch_size(num_examples, 1 / steps)
        largest = min(_validate.count("max_batch_size", max_batch_size), num_examples)
        self.__attrs_init__(num_examples, steps, separation, largest)

    @property
    def expected_batch_size(self) -> float:
        """The mean size of a batch."""
        return self.num_examples / self.steps_per_round

    @property
    def num_choices(self) -> int:
        """Among how many steps an example chooses in each of its rounds."""
        return self.steps_per_round - self.min_separation + 1

    def resized(self, max_batch_size: int | None) -> "MinSeparated":
        """See `Sampler.resized`."""
        counts = (self.num_examples, self.steps_per_round, self.min_separation)
        return MinSeparated(*counts, max_batch_size)

    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums: one random allocation per round.

        Fix when the rounds of the example begin. Then they are disjoint and independent. A round of
        which only a part lies in the run costs no more than a whole one. Every round is charged at
        the smallest noise of the run.
        """
        noise = as_schedule(noise_multiplier).slice(0, num_steps).min
        rounds = self._num_rounds(num_steps)

        def run(noise: float) -> dp_accounting.DpEvent:
            one_round = random_allocation_event(self.num_choices, noise)
            return dp_accounting.SelfComposedDpEvent(one_round, rounds)

        adds = parse_relation(relation or self.relation) == NeighboringRelation.ADD_OR_REMOVE_ONE
        if not adds or self.max_batch_size == self.num_examples:
            return run(noise)
        full = min(rounds * self.num_choices * self._probability_of_full(), 1.0)
        return KnownBranchDpEvent(run(noise), run(noise / 2), full)

    def participation(self, num_steps: int) -> Participation:
        """See `Sampler.participation`."""
        rounds = self._num_rounds(num_steps)
        crowded = min(rounds * self._probability_of_full(), 1.0)
        pattern = Separated(self.min_separation, max(rounds, 1))
        return Participation(pattern, rounds, crowded=crowded)

    def _num_rounds(self, num_steps: int) -> int:
        """The most rounds in which an example can take part within the run."""
        # Either its first round begins with the run. Or it begins as late as it can while the last
        # choice of the round before is still within the run.
        aligned = -(-num_steps // self.steps_per_round)
        if self.num_choices == 1:
            return aligned
        later = -(-max(num_steps - self.min_separation, 0) // self.steps_per_round)
        return max(aligned, 1 + later)

    def _probability_of_full(self) -> float:
        """The probability that the other examples fill a given batch."""
        import scipy.stats  # slow to import

        others = scipy.stats.binom(self.num_examples - 1, 1 / self.steps_per_round)
        return float(others.sf(self.max_batch_size - 1))

    def _round(self, key: PRNGKeyArray, step: Array) -> tuple[Array, Array]:
        """Draws who takes part in each of the `steps_per_round` steps around `step`."""
        key = allowed_key("the key of a sampler state", key)
        begin_key, choice_key, order_key = jax.random.split(key, 3)
        shape, number = (self.num_examples,), step // self.steps_per_round
        begins = jax.random.randint(begin_key, shape, 0, self.steps_per_round, jnp.int32)

        def turns(of_round: Array) -> Array:
            """The turns of a round of every example, in steps from where it could first begin."""
            round_key = jax.random.fold_in(choice_key, of_round)
            choice = jax.random.randint(round_key, shape, 0, self.num_choices, jnp.int32)
            return begins + choice

        # A round that began before these steps may have its turn in them. Rounds have numbers from
        # zero on; number zero begins before the run.
        earlier, current = turns(number) - self.steps_per_round, turns(number + 1)
        steps = jnp.concatenate([earlier, current])
        is_here = (steps >= 0) & (steps < self.steps_per_round)
        return sort_by_place(
            jax.random.fold_in(order_key, number),
            jnp.where(is_here, steps, self.steps_per_round),
            jnp.tile(jnp.arange(self.num_examples, dtype=jnp.int32), 2),
            self.steps_per_round,
        )
