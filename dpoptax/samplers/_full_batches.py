"""Base class of samplers with a fixed batch size."""

import attrs

from dpoptax import _validate
from dpoptax._foreign_names import answer_foreign_names
from dpoptax.samplers._base import Sampler


@attrs.frozen(init=False)
class FullBatches(Sampler):
    """Base class of samplers whose batches have a fixed size."""

    num_examples: int
    batch_size: int

    # A fraction is accepted here, to be refused with the remedy for a rate.
    @answer_foreign_names
    def __init__(self, num_examples: int, batch_size: int | float) -> None:
        num_examples = _validate.num_examples(num_examples)
        size = _validate.whole_batch_size("batch_size", batch_size, num_examples)
        self.__attrs_init__(num_examples, size)

    @property
    def expected_batch_size(self) -> float:
        """The batch size: the public number that the sum is divided by."""
        return float(self.batch_size)

    @property
    def max_batch_size(self) -> int:
        """The static size of every batch."""
        return self.batch_size
