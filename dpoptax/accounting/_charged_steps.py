"""Record of the steps that a ledger was charged: their noise multipliers, by restart."""

from collections.abc import Iterable

from dpoptax.schedules import ScalarOrSchedule, Schedule

# A noise multiplier, and how many consecutive steps had it.
Run = tuple[float, int]


class ChargedSteps:
    """Steps in segments: within one, the sampler continues; between two, it starts again.

    The distinction matters where the steps of one pass are accounted together, as for `Shuffled`.
    """

    def __init__(self, segments: Iterable[Iterable[Run]] = ((),)) -> None:
        self.segments = [list(segment) for segment in segments]

    def add(self, noise_multiplier: float, count: int) -> None:
        """Adds steps to the last segment; equal ones are counted together."""
        segment = self.segments[-1]
        if segment and segment[-1][0] == noise_multiplier:
            count += segment.pop()[1]
        segment.append((noise_multiplier, count))

    def restart(self) -> None:
        """Starts a new segment, unless the last one is empty."""
        if self.segments[-1]:
            self.segments.append([])

    def extended(self, count: int) -> "ChargedSteps":
        """Returns a copy with more steps like the last one."""
        # The constructor copies the lists, so that this record stays as it is.
        copy = ChargedSteps(self.segments)
        copy.add(copy.segments[-1][-1][0], count)
        return copy

    @property
    def num_steps(self) -> int:
        """The number of steps in all segments."""
        return sum(map(_length, self.segments))

    @property
    def num_last(self) -> int:
        """The number of steps in the last segment."""
        return _length(self.segments[-1])

    @property
    def noise_multiplier(self) -> ScalarOrSchedule:
        """The noise multiplier of all steps in their order; 0 if there are none."""
        return _noise_multiplier([run for segment in self.segments for run in segment])

    @property
    def runs(self) -> list[tuple[ScalarOrSchedule, int]]:
        """The noise multiplier and the number of steps of each segment that has any."""
        return [
            (_noise_multiplier(segment), _length(segment)) for segment in self.segments if segment
        ]

    def key(self) -> tuple[tuple[Run, ...], ...]:
        """A hashable form: equal keys mean equal cost."""
        return tuple(map(tuple, self.segments))


def _length(segment: list[Run]) -> int:
    return sum(count for _, count in segment)


def _noise_multiplier(segment: list[Run]) -> ScalarOrSchedule:
    if not segment:
        return 0.0
    values, lengths = zip(*segment, strict=True)
    return values[0] if len(values) == 1 else Schedule(values, lengths)
