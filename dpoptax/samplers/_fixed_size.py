"""Fixed-size sampling: a uniform subset of the same size in every step."""

import attrs
import dp_accounting
import jax.numpy as jnp

from dpoptax._dp_events import compose_passes
from dpoptax.relations import Relation
from dpoptax.samplers._base import Batch, SamplerState
from dpoptax.samplers._full_batches import FullBatches
from dpoptax.samplers._subset import sample_without_replacement
from dpoptax.schedules import ScalarOrSchedule


@attrs.frozen(init=False)
class FixedSize(FullBatches):
    """A uniform random subset of `batch_size` examples in each step, without replacement.

    Every batch is full, which is convenient and expensive. One example more in the data displaces
    another one from the batch, and the sum moves by twice the clip bound. At 60,000 examples,
    batches of 128, 9,380 steps and noise multiplier 1.1 this costs epsilon 6.3, and `Poisson`
    costs 0.9 (delta 1e-5, add or remove one). Prefer `Poisson`.

    Attributes:
        num_examples: how many examples there are.
        batch_size: how many of them take part in each step.

    Raises:
        TypeError: a size is not a whole number.
        ValueError: a size is out of range, or is a rate.

    Example:
        >>> import jax
        >>> sampler = FixedSize(num_examples=10**9, batch_size=4)
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0)))
        >>> batch.indices.shape, bool(batch.mask.all())
        ((4,), True)
    """

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch, drawn independently of all others."""
        (key,) = state.keys(1)
        indices = sample_without_replacement(key, self.num_examples, self.batch_size)
        return state.advanced(), Batch(indices, jnp.ones(self.batch_size, bool))

    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums; it is the same under every relation.

        Its noise multiplier is relative to the clip bound. `accounting.event_epsilon` knows that
        one example moves the sum by twice the clip bound; dp-accounting's own accountants do not.
        """
        del relation

        def one_step(noise_multiplier: float) -> dp_accounting.DpEvent:
            gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
            return dp_accounting.SampledWithoutReplacementDpEvent(
                self.num_examples, self.batch_size, gaussian
            )

        return compose_passes(one_step, noise_multiplier, num_steps)
