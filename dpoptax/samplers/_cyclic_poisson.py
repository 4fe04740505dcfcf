"""Cyclic Poisson sampling: the examples stand in fixed groups, which take turns."""

import dataclasses
import functools
from typing import ClassVar

import dp_accounting
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.relations import Relation
from dpoptax.samplers._base import Batch, SamplerState, composed, refuse_adding, start
from dpoptax.samplers._poisson import default_capacity, draw, law
from dpoptax.schedules import Scheduled


@dataclasses.dataclass(frozen=True)
class CyclicPoisson:
    """Step t draws a Poisson batch from group t modulo `num_groups`, and no other.

    Example i is in group i modulo `num_groups`, for good: its neighbour lacks it, and keeps all
    others at their places. An example takes part in every
    `num_groups`-th step at most, at a rate `num_groups` times that of `Poisson`: a sampler for
    data that comes in parts, and for noise that is correlated between steps.

    Attributes:
        num_examples: how many examples there are.
        expected_batch_size: the mean size of a batch, in examples; need not be whole.
        num_groups: how many groups take turns.
        max_batch_size: as in `Poisson`.

    Raises:
        TypeError: a count that is not whole.
        ValueError: a number out of range; more examples per batch than a group has.

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
    max_batch_size: int | None = None

    unit: ClassVar[str] = "example"
    relation: ClassVar[str] = "replace_special"

    def __post_init__(self) -> None:
        num_examples = _validate.num_examples(self.num_examples)
        groups = _validate.count("num_groups", self.num_groups)
        if groups > num_examples:
            raise ValueError(
                f"num_groups cannot exceed num_examples; got {groups} of {num_examples}."
            )
        expected = _validate.size_of_batch(
            "expected_batch_size", self.expected_batch_size, num_examples
        )
        if expected > num_examples / groups:
            raise ValueError(
                f"expected_batch_size cannot exceed the size of a group; got {expected:g} and "
                f"{num_examples} examples in {groups} groups. Take fewer groups."
            )
        object.__setattr__(self, "num_examples", num_examples)
        object.__setattr__(self, "expected_batch_size", expected)
        object.__setattr__(self, "num_groups", groups)
        capacity = self.max_batch_size
        if capacity is None:
            capacity = default_capacity(self._largest_group, self.sampling_rate)
        capacity = min(_validate.count("max_batch_size", capacity), self._largest_group)
        object.__setattr__(self, "max_batch_size", capacity)

    @property
    def sampling_rate(self) -> float:
        """The probability that an example is in a batch of its group."""
        return min(1.0, self.expected_batch_size * self.num_groups / self.num_examples)

    def init(self, key: PRNGKeyArray, step: int = 0) -> SamplerState:
        """Returns the state before batch number `step`.

        `key` must serve sampling and nothing else.
        """
        return start(key, step)

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch, drawn independently of all others."""
        group = state.step % self.num_groups
        num_larger = self.num_examples % self.num_groups
        batch = self._draw(state, self._largest_group)
        if num_larger:
            smaller = self._draw(state, self._largest_group - 1)
            batch = jax.tree.map(lambda a, b: jnp.where(group < num_larger, a, b), batch, smaller)
        indices = batch.indices * self.num_groups + group
        return state.advanced(), Batch(jnp.where(batch.mask, indices, 0), batch.mask)

    def event(
        self, noise_multiplier: Scheduled, num_steps: int, relation: Relation = "replace_special"
    ) -> dp_accounting.DpEvent:
        """Returns the event of the steps in which the first group, the busiest, takes its turn.

        Raises:
            ValueError: under `add_or_remove_one`, for which nothing is proven: one example more
                moves others to other groups.
        """
        refuse_adding(relation, "groups by place", "groups")
        assert self.max_batch_size is not None  # __post_init__ has filled it in
        one_turn = functools.partial(
            law, self._largest_group, self.sampling_rate, self.max_batch_size
        )
        return composed(one_turn, noise_multiplier, num_steps, self.num_groups)

    @property
    def _largest_group(self) -> int:
        return -(-self.num_examples // self.num_groups)

    def _draw(self, state: SamplerState, size: int) -> Batch:
        """A batch of a group of that size, padded to the capacity of all."""
        assert self.max_batch_size is not None  # __post_init__ has filled it in
        capacity = min(self.max_batch_size, size)
        batch = draw(state, size, self.sampling_rate, capacity)
        missing = self.max_batch_size - capacity
        return jax.tree.map(lambda leaf: jnp.pad(leaf, (0, missing)), batch)
