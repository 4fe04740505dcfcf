"""Poisson sampling with padded batches: each example joins a batch independently.

We draw a batch size b ~ Binomial(num_examples, sampling_rate), then b examples without
replacement. This is the same distribution as independent inclusion (Lemma 1 of arXiv:2406.17298),
in arrays of static shape. Sizes above the padded one are never drawn: the distribution is that of a
batch that is drawn again while it is too large. Cutting it instead would let one example more push
another one out, and cost more.
"""

import functools

import attrs
import dp_accounting
import jax.numpy as jnp

from dpoptax import _validate
from dpoptax._dp_events import compose_passes, limited_poisson_event
from dpoptax._foreign_names import answer_foreign_names
from dpoptax.relations import Relation
from dpoptax.samplers._base import Batch, Sampler, SamplerState, padded_batch
from dpoptax.samplers._binomial import default_max_batch_size, limited_binomial
from dpoptax.samplers._subset import sample_without_replacement
from dpoptax.schedules import ScalarOrSchedule


@attrs.frozen(init=False)
class Poisson(Sampler):
    """Poisson sampling with batches padded to a static size.

    A batch of more than `max_batch_size` examples is drawn again. The privacy event accounts for
    this: it adds to epsilon, in every step, the sampling rate times the probability that the other
    examples fill the batch. Under the other relations it costs nothing. The default size is so
    large that a batch practically never exceeds it (probability at most 1e-14 per step). A `Plan`
    replaces this default by the smallest size that costs at most 0.1 % of epsilon. An even smaller
    size saves time and costs epsilon.

    Attributes:
        num_examples: how many examples there are.
        expected_batch_size: sampling_rate * num_examples, in examples; need not be whole.
        max_batch_size: the padded size of every batch; None in the constructor for the default
            described above.

    Raises:
        TypeError: a size is not a number, or a count is not a whole number.
        ValueError: a size is out of range, or is a rate.

    Example:
        >>> import jax
        >>> sampler = Poisson(num_examples=1000, expected_batch_size=50, max_batch_size=80)
        >>> state = sampler.init(jax.random.key(0))
        >>> state, batch = jax.jit(sampler.sample)(state)
        >>> batch.indices.shape, batch.mask.dtype
        ((80,), dtype('bool'))

    Reference: Lemma 1 of arXiv:2406.17298 for the construction.
    """

    num_examples: int
    expected_batch_size: float
    max_batch_size: int

    @answer_foreign_names
    def __init__(
        self, num_examples: int, expected_batch_size: float, max_batch_size: int | None = None
    ) -> None:
        num_examples = _validate.num_examples(num_examples)
        expected = _validate.expected_batch_size(
            "expected_batch_size", expected_batch_size, num_examples
        )
        if max_batch_size is None:
            max_batch_size = default_max_batch_size(num_examples, expected / num_examples)
        largest = min(_validate.count("max_batch_size", max_batch_size), num_examples)
        refuse_limit_on_everyone(expected / num_examples, largest, num_examples)
        self.__attrs_init__(num_examples, expected, largest)

    @property
    def sampling_rate(self) -> float:
        """The probability that an example is in a batch."""
        return self.expected_batch_size / self.num_examples

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch, drawn independently of all others."""
        batch = draw_batch(state, self.num_examples, self.sampling_rate, self.max_batch_size)
        return state.advanced(), batch

    def resized(self, max_batch_size: int | None) -> "Poisson":
        """See `Sampler.resized`."""
        return Poisson(self.num_examples, self.expected_batch_size, max_batch_size)

    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums; it is the same under every relation."""
        del relation
        one_step = functools.partial(
            limited_poisson_event, self.num_examples, self.sampling_rate, self.max_batch_size
        )
        return compose_passes(one_step, noise_multiplier, num_steps)


def refuse_limit_on_everyone(rate: float, max_batch_size: int, num_examples: int) -> None:
    """Raises where every example takes part in every step, and the batch has no room for them."""
    if rate == 1 and max_batch_size < num_examples:
        raise ValueError(
            f"max_batch_size must be {num_examples} where all of {num_examples} examples take part "
            f"in every step; got {max_batch_size}. Leave it out, or expect smaller batches."
        )


def draw_batch(state: SamplerState, num_examples: int, rate: float, max_batch_size: int) -> Batch:
    """Draws a Poisson batch, given that it has at most `max_batch_size` examples."""
    size_key, subset_key = state.keys(2)
    size = limited_binomial(size_key, num_examples, rate, max_batch_size)
    mask = jnp.arange(max_batch_size, dtype=jnp.int32) < size
    indices = sample_without_replacement(subset_key, num_examples, max_batch_size)
    return padded_batch(indices, mask, num_examples)
