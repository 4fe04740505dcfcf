"""How many rows of a padded batch most steps need."""

import math

from dpoptax.samplers import Sampler

# A size that a batch exceeds about once in ten steps. Sizes that fill the vectors of a CPU are
# quicker than those in between.
STANDARD_DEVIATIONS, MULTIPLE = 1.3, 8
# Each size is compiled, so it must leave out at least this part of the rows.
LEAST_PADDING = 0.08


def usual_size(sampler: Sampler) -> int | None:
    """Returns how many rows hold all examples of most batches; None if there is little padding.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> usual_size(Poisson(60_000, 128, max_batch_size=176))
        144
    """
    expected, largest = sampler.expected_batch_size, sampler.max_batch_size
    if callable(expected):  # A schedule: no size is usual for all steps.
        return None
    # As many examples as Poisson sampling draws; other samplers vary less.
    size = expected + STANDARD_DEVIATIONS * math.sqrt(expected)
    usual = MULTIPLE * math.ceil(size / MULTIPLE)
    return usual if usual <= (1 - LEAST_PADDING) * largest else None
