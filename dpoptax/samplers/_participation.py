"""Participation: in how many steps an example takes part, and how far apart these steps are."""

import attrs


@attrs.frozen
class Participation:
    """In which steps of a run one example may take part.

    Neighbouring data sets differ only in the sums of these steps, by one clip bound each. Under
    `add_or_remove_one` there is an exception: with probability `crowded`, one example more takes
    the place of another one in some of its steps, and moves the sums of these steps by two clip
    bounds. Who takes part never depends on what was released before.

    The accounting of correlated noise uses this.

    Attributes:
        max_count: the most steps in which one example takes part.
        min_separation: the least distance between two of these steps, in steps; 1 for any two.
        independent: each example may join only steps that are fixed before the run and
            `min_separation` apart, and joins each of them independently of all else. Noise that is
            correlated over at most `min_separation` steps is then accounted by the event of the
            sampler.
        crowded: see above; for the whole run.

    Example:
        >>> from dpoptax.samplers import CyclicPoisson
        >>> sampler = CyclicPoisson(num_examples=1000, expected_batch_size=10, num_groups=4)
        >>> pattern = sampler.participation(num_steps=100)
        >>> pattern.max_count, pattern.min_separation
        (25, 4)
    """

    max_count: int
    min_separation: int
    independent: bool = False
    crowded: float = 0.0
