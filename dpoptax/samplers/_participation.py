"""Participation: in which steps of a run one example may take part, for correlated noise."""

import attrs

from dpoptax._patterns import Pattern


@attrs.frozen
class Participation:
    """In which steps of a run one example may take part.

    Neighbouring data sets differ only in the sums of these steps, by one clip bound each. Under
    `add_or_remove_one` there is an exception: with probability `crowded`, one example more takes
    the place of another one in some of its steps, and moves the sums of these steps by two clip
    bounds. Who takes part never depends on what was released before.

    The accounting of correlated noise uses this.

    Attributes:
        pattern: which sets of steps are possible, one of `dpoptax.mechanisms.strategies.Separated`,
            `Cyclic` and `OncePerRound`.
        max_count: the most steps of the run in which one example takes part.
        independent: each example may join only steps that are fixed before the run and
            `min_separation` apart, and joins each of them independently of all else. Noise that is
            correlated over at most `min_separation` steps is then accounted by the event of the
            sampler.
        crowded: see above; for the whole run.

    Example:
        >>> from dpoptax.samplers import CyclicPoisson
        >>> sampler = CyclicPoisson(num_examples=1000, expected_batch_size=10, num_groups=4)
        >>> participation = sampler.participation(num_steps=100)
        >>> participation.max_count, participation.min_separation
        (25, 4)
    """

    pattern: Pattern
    max_count: int
    independent: bool = False
    crowded: float = 0.0

    @property
    def min_separation(self) -> int:
        """The least distance between two of these steps, in steps; 1 for any two."""
        return self.pattern.smallest_gap(1)
