"""Fixed-size sampling: each step takes the same number of examples, without replacement."""

import dataclasses
from typing import ClassVar

import dp_accounting
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.relations import Relation
from dpoptax.samplers import feistel
from dpoptax.samplers._base import Batch, SamplerState, composed, start
from dpoptax.schedules import Scheduled


@dataclasses.dataclass(frozen=True)
class FixedSize:
    """A uniform random subset of `batch_size` examples per step, drawn anew each time.

    Every batch is full, which is convenient and expensive: one example more in the data evicts
    another from the batch, a move of twice the clip bound. At 60,000 examples, batches of 128,
    9,380 steps and noise multiplier 1.1 this costs epsilon 6.3 where `Poisson` costs 0.9
    (delta 1e-5, add or remove one). Prefer `Poisson`.

    Attributes:
        num_examples: how many examples there are.
        batch_size: how many of them take part in each step.

    Raises:
        TypeError: a size that is not a whole number.
        ValueError: a size out of range; a rate given where a size is expected.

    Example:
        >>> import jax
        >>> sampler = FixedSize(num_examples=10**9, batch_size=4)
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0)))
        >>> batch.indices.shape, bool(batch.mask.all())
        ((4,), True)

    Reference: the Feistel minibatch of arXiv:2406.17298, section 4.3.
    """

    num_examples: int
    batch_size: int | float  # whole; a fraction is refused with the remedy for a rate

    unit: ClassVar[str] = "example"
    relation: ClassVar[str] = "add_or_remove_one"

    def __post_init__(self) -> None:
        num_examples = _validate.num_examples(self.num_examples)
        size = _validate.whole_size_of_batch("batch_size", self.batch_size, num_examples)
        object.__setattr__(self, "num_examples", num_examples)
        object.__setattr__(self, "batch_size", size)

    @property
    def expected_batch_size(self) -> float:
        """The size of every batch."""
        return float(self.batch_size)

    @property
    def max_batch_size(self) -> int:
        """The size of every batch."""
        return int(self.batch_size)

    def init(self, key: PRNGKeyArray, step: int = 0) -> SamplerState:
        """Returns the state before batch number `step`.

        `key` must serve sampling and nothing else.
        """
        return start(key, step)

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch, drawn independently of all others."""
        (key,) = state.keys(1)
        places = jnp.arange(self.max_batch_size, dtype=jnp.int32)
        indices = feistel.permute(key, places, self.num_examples)
        return state.advanced(), Batch(indices, jnp.ones(self.max_batch_size, bool))

    def event(
        self, noise_multiplier: Scheduled, num_steps: int, relation: Relation = "add_or_remove_one"
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums over batches of this sampler.

        The noise multiplier in it is relative to the clip bound; `accounting.event_epsilon` knows
        that one example moves the sum by twice that, dp-accounting's own accountants do not.
        """
        del relation

        def one_step(noise_multiplier: float) -> dp_accounting.DpEvent:
            gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
            return dp_accounting.SampledWithoutReplacementDpEvent(
                self.num_examples, self.max_batch_size, gaussian
            )

        return composed(one_step, noise_multiplier, num_steps)
