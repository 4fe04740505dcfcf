"""Cyclic Poisson sampling: fixed groups of examples take turns."""

from typing import ClassVar

import attrs
import dp_accounting
import jax
import jax.numpy as jnp

from dpoptax import _validate
from dpoptax._dp_events import compose_passes
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._patterns import Cyclic
from dpoptax.relations import Relation
from dpoptax.samplers._base import (
    Batch,
    Sampler,
    SamplerState,
    padded_batch,
    refuse_add_or_remove_one,
)
from dpoptax.samplers._binomial import default_max_batch_size
from dpoptax.samplers._participation import Participation
from dpoptax.samplers._poisson import draw_batch, refuse_limit_on_everyone
from dpoptax.schedules import ScalarOrSchedule


@attrs.frozen(init=False)
class CyclicPoisson(Sampler):
    """Poisson sampling from one group of examples at a time.

    Step t draws a Poisson batch from group t modulo `num_groups`, and example i is always in
    group i modulo `num_groups`. An example therefore takes part in every `num_groups`-th step at
    most, at a rate `num_groups` times that of `Poisson`. This suits data that comes in parts, and
    noise that is correlated between steps.

    Groups are made by index, so the guarantee is about an example that contributes nothing and
    keeps its index (`replace_special`), not about one that is removed.

    Attributes:
        num_examples: how many examples there are.
        expected_batch_size: the mean size of a batch, in examples; need not be whole.
        num_groups: how many groups take turns.
        max_batch_size: as in `Poisson`. It does not change epsilon.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: a number is out of range, or batches are larger than a group.

    Example:
        >>> import jax
        >>> sampler = CyclicPoisson(num_examples=10, expected_batch_size=2.5, num_groups=2)
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0), step=1))
        >>> set((batch.indices[batch.mask] % 2).tolist())
        {1}

    Reference: Choquette-Choo et al. 2023, arXiv:2306.08153 (cyclic Poisson sampling).
    """

    num_examples: int
    expected_batch_size: float
    num_groups: int
    max_batch_size: int

    relation: ClassVar[str] = "replace_special"

    @answer_foreign_names
    def __init__(
        self,
        num_examples: int,
        expected_batch_size: float,
        num_groups: int,
        max_batch_size: int | None = None,
    ) -> None:
        num_examples, expected, groups = checked_sizes(
            num_examples, expected_batch_size, num_groups, limit="size of a group"
        )
        # Batches of all groups share one static size, which the largest group decides.
        largest_group = _largest_group(num_examples, groups)
        rate = sampling_rate_of_group(num_examples, expected, groups)
        if max_batch_size is None:
            max_batch_size = default_max_batch_size(largest_group, rate)
        largest = min(_validate.count("max_batch_size", max_batch_size), largest_group)
        refuse_limit_on_everyone(rate, largest, largest_group)
        self.__attrs_init__(num_examples, expected, groups, largest)

    @property
    def sampling_rate(self) -> float:
        """The probability that an example is in a batch of its group."""
        return sampling_rate_of_group(self.num_examples, self.expected_batch_size, self.num_groups)

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch, drawn independently of all others."""
        group = state.step % self.num_groups
        largest_group = _largest_group(self.num_examples, self.num_groups)
        batch = self._draw(state, largest_group)
        # Groups differ in size by at most one. Sizes are static, so both batches are drawn and
        # the group selects one of them.
        num_larger = self.num_examples % self.num_groups
        if num_larger:
            smaller = self._draw(state, largest_group - 1)
            batch = jax.tree.map(lambda a, b: jnp.where(group < num_larger, a, b), batch, smaller)
        indices = batch.indices * self.num_groups + group
        return state.advanced(), padded_batch(indices, batch.mask, self.num_examples)

    def resized(self, max_batch_size: int | None) -> "CyclicPoisson":
        """See `Sampler.resized`."""
        sizes = (self.num_examples, self.expected_batch_size, self.num_groups)
        return CyclicPoisson(*sizes, max_batch_size)

    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the event of the steps of the first group, which has the most turns.

        Raises:
            ValueError: under `add_or_remove_one`, for which nothing is proven: one example more
                moves others to other groups.
        """
        refuse_add_or_remove_one(relation or self.relation, "groups by index", "groups")

        def one_turn(noise_multiplier: float) -> dp_accounting.DpEvent:
            # An empty example takes part in batches as others do, so that a limit on their size
            # costs nothing; see `LimitedPoissonDpEvent`.
            gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
            return dp_accounting.PoissonSampledDpEvent(self.sampling_rate, gaussian)

        return compose_passes(one_turn, noise_multiplier, num_steps, self.num_groups)

    def participation(self, num_steps: int) -> Participation:
        """See `Sampler.participation`: an example may join every `num_groups`-th step."""
        pattern = Cyclic(self.num_groups)
        return Participation(pattern, pattern.largest_count(num_steps), independent=True)

    def _draw(self, state: SamplerState, group_size: int) -> Batch:
        """Draws the padded batch of a group."""
        size = min(self.max_batch_size, group_size)
        batch = draw_batch(state, group_size, self.sampling_rate, size)
        return padded_batch(*batch, self.num_examples, self.max_batch_size)


def _largest_group(num_examples: int, num_groups: int) -> int:
    return -(-num_examples // num_groups)


def sampling_rate_of_group(num_examples: int, expected_batch_size: float, num_groups: int) -> float:
    # Rounding can take the quotient above one where a batch is expected to be a whole group.
    return min(1.0, expected_batch_size * num_groups / num_examples)


def checked_sizes(
    num_examples: int, expected_batch_size: float, num_groups: int, *, limit: str
) -> tuple[int, float, int]:
    """Returns the three numbers; refuses batches that are larger than a group."""
    num_examples = _validate.num_examples(num_examples)
    groups = _validate.count("num_groups", num_groups)
    if groups > num_examples:
        raise ValueError(
            f"num_groups cannot exceed num_examples; got {groups} of {num_examples}. Take fewer "
            "groups."
        )
    expected = _validate.expected_batch_size(
        "expected_batch_size", expected_batch_size, num_examples
    )
    if expected > num_examples / groups:
        raise ValueError(
            f"expected_batch_size cannot exceed the {limit}; got {expected:g} and {num_examples} "
            f"examples in {groups} groups. Take fewer groups."
        )
    return num_examples, expected, groups
