"""Batches whose size changes after steps known in advance: Poisson samplers that take turns."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import dp_accounting
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.relations import Relation
from dpoptax.samplers._base import Batch, SamplerState, start
from dpoptax.samplers._poisson import Poisson, draw
from dpoptax.schedules import Schedule, Scheduled, slice_of


@dataclasses.dataclass(frozen=True)
class PoissonSchedule:
    """Poisson sampling at a rate that changes with the step: small batches first, say.

    Every batch is padded to the largest capacity, so that one compiled program serves all stages.

    Attributes:
        stages: pairs of a `Poisson` sampler and the number of its steps; the last one goes on for
            as long as the run does.

    Raises:
        TypeError: a stage that is not such a pair.
        ValueError: no stage, or stages over different numbers of examples.

    Example:
        >>> import jax
        >>> sampler = PoissonSchedule([(Poisson(1000, 16), 100), (Poisson(1000, 64), 100)])
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0), step=150))
        >>> float(sampler.expected_batch_size(99)), float(sampler.expected_batch_size(100))
        (16.0, 64.0)
    """

    stages: Sequence[tuple[Poisson, int]]

    unit: ClassVar[str] = "example"
    relation: ClassVar[str] = "add_or_remove_one"

    def __post_init__(self) -> None:
        stages = []
        for stage in self.stages:
            if not (isinstance(stage, tuple | list) and isinstance(stage[0], Poisson)):
                raise TypeError(f"a stage is a pair (Poisson sampler, steps); got {stage!r}.")
            sampler, length = stage
            stages.append((sampler, _validate.count("steps of a stage", length)))
        sizes = sorted({sampler.num_examples for sampler, _ in stages})
        if len(sizes) != 1:
            raise ValueError(
                f"stages must draw from the same examples, and be at least one; got sizes {sizes}."
            )
        object.__setattr__(self, "stages", tuple(stages))

    @property
    def num_examples(self) -> int:
        """How many examples there are to draw from."""
        return self.stages[0][0].num_examples

    @property
    def expected_batch_size(self) -> Schedule:
        """The mean size of a batch at each step."""
        samplers, lengths = zip(*self.stages, strict=True)
        return Schedule(tuple(sampler.expected_batch_size for sampler in samplers), lengths)

    @property
    def max_batch_size(self) -> int:
        """The static size of every batch."""
        return max(sampler.capacity for sampler, _ in self.stages)

    def init(self, key: PRNGKeyArray, step: int = 0) -> SamplerState:
        """Returns the state before batch number `step`.

        `key` must serve sampling and nothing else.
        """
        return start(key, step)

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch, drawn independently of all others."""
        ends = list(itertools.accumulate(length for _, length in self.stages))[:-1]
        stage = jnp.sum(state.step >= jnp.asarray(ends, jnp.int32), dtype=jnp.int32)
        branches = [self._branch(sampler) for sampler, _ in self.stages]
        return state.advanced(), jax.lax.switch(stage, branches, state)

    def event(
        self, noise_multiplier: Scheduled, num_steps: int, relation: Relation = "add_or_remove_one"
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums: those of the stages, one after another."""
        events, first = [], 0
        for number, (sampler, length) in enumerate(self.stages):
            last = num_steps if number + 1 == len(self.stages) else min(first + length, num_steps)
            if first < last:
                noise = slice_of(noise_multiplier, first, last)
                events.append(sampler.event(noise, last - first, relation))
            first = last
        return events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)

    def _branch(self, sampler: Poisson) -> Callable[[SamplerState], Batch]:
        def branch(state: SamplerState) -> Batch:
            batch = draw(state, sampler.num_examples, sampler.sampling_rate, sampler.capacity)
            missing = self.max_batch_size - sampler.capacity
            return jax.tree.map(lambda leaf: jnp.pad(leaf, (0, missing)), batch)

        return branch
