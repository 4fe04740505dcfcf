"""Cyclic Poisson sampling with random groups: an example more moves no other example."""

from typing import NamedTuple

import attrs
import dp_accounting
import jax
import jax.numpy as jnp
from dp_accounting import NeighboringRelation
from jaxtyping import Array, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._dp_events import KnownBranchDpEvent, compose_passes
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._patterns import Cyclic
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers._base import Batch, Sampler, SamplerState, padded_batch
from dpoptax.samplers._binomial import default_max_batch_size
from dpoptax.samplers._cyclic_poisson import checked_sizes, sampling_rate_of_group
from dpoptax.samplers._participation import Participation
from dpoptax.samplers._poisson import draw_batch, refuse_limit_on_everyone
from dpoptax.samplers._sorted import sort_by_place
from dpoptax.schedules import ScalarOrSchedule


class RandomCyclicPoissonState(NamedTuple):
    """What the next batch needs.

    Attributes:
        step: the number of the next batch, int32.
        key: the sampling key; the same in every step.
        order: the examples sorted by their group, int32 `(num_examples,)`.
        starts: the position in `order` where each group begins, int32 `(num_groups + 1,)`.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    order: Int[Array, " num_examples"]
    starts: Int[Array, " num_groups_and_one"]

    def __repr__(self) -> str:
        """Leaves out the key and the groups, which must not appear in logs."""
        return f"RandomCyclicPoissonState(step={self.step}, <not shown>)"


@attrs.frozen(init=False)
class RandomCyclicPoisson(Sampler):
    """Poisson sampling from one group at a time, where each example draws its own group.

    As in `CyclicPoisson`, step t draws a Poisson batch from group t modulo `num_groups`. But each
    example draws its group once, from the key, independently of the others. So one example more
    moves no other one, and the guarantee is about examples that are added or removed.

    A group has a fixed number of places, more than it has examples. A batch is drawn from the
    places of its group, and an empty place gives no example. One example more takes an empty place,
    so that it displaces no other one, however small the batches are. A group has too few places
    with probability 1e-14, which is paid from delta; further examples then sit out.

    The groups are drawn by `init`, which sorts all examples once. The key must stay the same in a
    run, as for every sampler.

    Attributes:
        num_examples: how many examples there are.
        expected_batch_size: the mean size of a batch, in examples; need not be whole.
        num_groups: how many groups take turns.
        max_batch_size: the padded size of every batch, in places. A larger batch is drawn again,
            which costs no epsilon. None in the constructor for a size that is practically never
            exceeded.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: a number is out of range, or batches are larger than a group.

    Example:
        >>> import jax
        >>> sampler = RandomCyclicPoisson(
        ...     num_examples=1000, expected_batch_size=25, num_groups=4
        ... )
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0)))
        >>> sampler.relation, sampler.sampling_rate
        ('add_or_remove_one', 0.1)

    Reference: Choquette-Choo et al. 2023, arXiv:2306.08153 (cyclic Poisson sampling).
    """

    num_examples: int
    expected_batch_size: float
    num_groups: int
    max_batch_size: int

    @answer_foreign_names
    def __init__(
        self,
        num_examples: int,
        expected_batch_size: float,
        num_groups: int,
        max_batch_size: int | None = None,
    ) -> None:
        num_examples, expected, groups = checked_sizes(
            num_examples, expected_batch_size, num_groups, limit="mean size of a group"
        )
        places = _num_places(num_examples, groups)
        rate = sampling_rate_of_group(num_examples, expected, groups)
        if max_batch_size is None:
            max_batch_size = default_max_batch_size(places, rate)
        largest = min(_validate.count("max_batch_size", max_batch_size), places)
        refuse_limit_on_everyone(rate, largest, places)
        self.__attrs_init__(num_examples, expected, groups, largest)

    @property
    def sampling_rate(self) -> float:
        """The probability that an example is in a batch of its group."""
        return sampling_rate_of_group(self.num_examples, self.expected_batch_size, self.num_groups)

    def init(self, key: PRNGKeyArray, step: int = 0) -> RandomCyclicPoissonState:
        """Returns the state before batch number `step`; see `Sampler.init`."""
        number, key = Sampler.init(self, key, step)
        group_key, order_key = jax.random.split(jax.random.fold_in(key, GROUPS))
        examples = jnp.arange(self.num_examples, dtype=jnp.int32)
        groups = jax.random.randint(group_key, examples.shape, 0, self.num_groups, jnp.int32)
        sorted_groups = sort_by_place(order_key, groups, examples, self.num_groups)
        return RandomCyclicPoissonState(number, key, *sorted_groups)

    def sample(self, state: RandomCyclicPoissonState) -> tuple[RandomCyclicPoissonState, Batch]:
        """Returns the next state and the next batch, drawn independently of all others."""
        key = allowed_key("the key of a sampler state", state.key)
        group = state.step % self.num_groups
        num_places = _num_places(self.num_examples, self.num_groups)
        places = draw_batch(
            SamplerState(state.step, key), num_places, self.sampling_rate, self.max_batch_size
        )
        first, after = state.starts[group], state.starts[group + 1]
        mask = places.mask & (places.indices < after - first)
        indices = state.order[jnp.where(mask, first + places.indices, 0)]
        state = state._replace(step=state.step + 1)
        return state, padded_batch(indices, mask, self.num_examples)

    def resized(self, max_batch_size: int | None) -> "RandomCyclicPoisson":
        """See `Sampler.resized`."""
        sizes = (self.num_examples, self.expected_batch_size, self.num_groups)
        return RandomCyclicPoisson(*sizes, max_batch_size)

    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the event of the steps of the first group, which has the most turns.

        Fix the groups of all other examples, and that of this one. Its place is in a batch with
        probability `sampling_rate`, or zero if the places of the others fill the batch. Whether the
        place is empty changes nothing else.
        """

        def one_turn(noise_multiplier: float) -> dp_accounting.DpEvent:
            gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
            return dp_accounting.PoissonSampledDpEvent(self.sampling_rate, gaussian)

        turns = compose_passes(one_turn, noise_multiplier, num_steps, self.num_groups)
        crowded = self._probability_of_no_place()
        adds = parse_relation(relation or self.relation) == NeighboringRelation.ADD_OR_REMOVE_ONE
        if not adds or crowded == 0:
            return turns
        no_place = KnownBranchDpEvent(
            dp_accounting.NoOpDpEvent(), dp_accounting.NonPrivateDpEvent(), crowded
        )
        return dp_accounting.ComposedDpEvent([turns, no_place])

    def participation(self, num_steps: int) -> Participation:
        """See `Sampler.participation`: an example may join every `num_groups`-th step."""
        pattern = Cyclic(self.num_groups)
        turns = pattern.largest_count(num_steps)
        crowded = self._probability_of_no_place()
        return Participation(pattern, turns, independent=True, crowded=crowded)

    def _probability_of_no_place(self) -> float:
        """The probability that the other examples fill the group of this one."""
        import scipy.stats  # slow to import

        others = scipy.stats.binom(self.num_examples - 1, 1 / self.num_groups)
        return float(others.sf(_num_places(self.num_examples, self.num_groups) - 1))


# Derives the key of the groups. Steps have the numbers from zero on.
GROUPS = 2**32 - 1


def _num_places(num_examples: int, num_groups: int) -> int:
    """How many examples a group has room for."""
    return min(default_max_batch_size(num_examples, 1 / num_groups) + 1, num_examples)
