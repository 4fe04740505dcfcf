"""Poisson sampling with a batch size that changes after steps known in advance."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import dp_accounting
import jax
import jax.numpy as jnp

from dpoptax import _validate
from dpoptax.relations import Relation
from dpoptax.samplers._base import Batch, Sampler, SamplerState, padded_batch
from dpoptax.samplers._poisson import Poisson, draw_batch
from dpoptax.schedules import ScalarOrSchedule, Schedule, as_schedule


def _stages(stages: Sequence[Any]) -> tuple[tuple[Poisson, int], ...]:
    checked = []
    for stage in stages:
        if not (isinstance(stage, tuple | list) and isinstance(stage[0], Poisson)):
            raise TypeError(
                f"a stage is a pair (Poisson sampler, steps); got {_validate.described(stage)}."
            )
        sampler, length = stage
        checked.append((sampler, _validate.count("steps of a stage", length)))
    sizes = sorted({sampler.num_examples for sampler, _ in checked})
    if len(sizes) != 1:
        raise ValueError(
            "stages must draw from the same examples, and there must be at least one stage; got "
            f"num_examples {sizes}. Give every Poisson sampler the same num_examples."
        )
    return tuple(checked)


@attrs.frozen
class PoissonSchedule(Sampler):
    """Poisson sampling at a rate that changes with the step, such as small batches first.

    Every batch is padded to the largest `max_batch_size`, so one compiled program serves all
    stages.

    Attributes:
        stages: pairs of a `Poisson` sampler and its number of steps. The last stage lasts until
            the run ends.

    Raises:
        TypeError: a stage is not such a pair.
        ValueError: there is no stage, or stages have different numbers of examples.

    Example:
        >>> import jax
        >>> sampler = PoissonSchedule([(Poisson(1000, 16), 100), (Poisson(1000, 64), 100)])
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0), step=150))
        >>> float(sampler.expected_batch_size(99)), float(sampler.expected_batch_size(100))
        (16.0, 64.0)
    """

    stages: Sequence[tuple[Poisson, int]] = attrs.field(converter=_stages)

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return self.stages[0][0].num_examples

    @property
    def expected_batch_size(self) -> Schedule:
        """The mean size of a batch at each step."""
        samplers, lengths = zip(*self.stages, strict=True)
        return Schedule(tuple(sampler.expected_batch_size for sampler in samplers), lengths)

    @property
    def max_batch_size(self) -> int:
        """The static size of every batch."""
        return max(sampler.max_batch_size for sampler, _ in self.stages)

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch, drawn independently of all others."""
        ends = list(itertools.accumulate(length for _, length in self.stages))[:-1]
        stage = jnp.sum(state.step >= jnp.asarray(ends, jnp.int32), dtype=jnp.int32)
        # `switch` needs branches of one shape: each pads its batch to the largest size.
        branches = [self._branch(sampler) for sampler, _ in self.stages]
        return state.advanced(), jax.lax.switch(stage, branches, state)

    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums: the composition of the stages' events."""
        noise = as_schedule(noise_multiplier)
        events, first = [], 0
        for number, (sampler, length) in enumerate(self.stages):
            # The last stage lasts until the run ends, as in `sample`.
            last = num_steps if number + 1 == len(self.stages) else min(first + length, num_steps)
            if first < last:
                events.append(sampler.event(noise.slice(first, last), last - first, relation))
            first = last
        return events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)

    def _branch(self, sampler: Poisson) -> Callable[[SamplerState], Batch]:
        """Returns a function that draws the padded batch of one stage."""
        sizes = (sampler.num_examples, sampler.sampling_rate, sampler.max_batch_size)

        def branch(state: SamplerState) -> Batch:
            return padded_batch(*draw_batch(state, *sizes), self.num_examples, self.max_batch_size)

        return branch
