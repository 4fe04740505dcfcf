"""Privacy events: what dp-accounting does not have, and how steps compose to a run."""

import bisect
import math
from collections.abc import Callable, Iterator

import attrs
import dp_accounting
import numpy as np
from dp_accounting import DpEvent

from dpoptax.schedules import ScalarOrSchedule, Schedule

# If a run has more distinct noise multipliers than this, each is rounded down to one of this many
# levels. Every level costs one privacy loss distribution; fifty levels between 0.8 and 2 are
# 2 % apart, which bounds the loss in epsilon.
MAX_NOISE_LEVELS = 50
# The smallest probability that some member of a group takes part. At smaller ones dp-accounting
# treats the group as never taking part, which would understate epsilon.
SMALLEST_GROUP_RATE = 1e-7


@attrs.frozen
class KnownBranchDpEvent(DpEvent):  # type: ignore[misc]
    """One of two releases at random, accounted as if the adversary knew which one.

    A batch that may overflow is such a case: an example more moves the sum by one clip bound if
    there is room, and by two if it displaces another example. Other releases can reveal which of
    the two happened: a small sum shows that the batch was not full. A mixture of Gaussians would
    assume that the adversary does not know, and promise too much. By joint convexity of every
    hockey-stick divergence D,

        D(P || Q) <= (1 - probability) D(P_usual || Q_usual) + probability D(P_rare || Q_rare),

    and the right-hand side is what we account.

    Attributes:
        usual: the release with probability `1 - probability`; or a composition, if one branch is
            taken for all of it. Compositions are accounted as if `rare` were always taken, unless
            delta can pay for it.
        rare: the release with probability `probability`, at least as costly; a composition too if
            `usual` is one.
        probability: of `rare`, the same on two neighbouring data sets.
    """

    usual: DpEvent
    rare: DpEvent
    probability: float


@attrs.frozen
class OneExampleDpEvent(dp_accounting.SelfComposedDpEvent):  # type: ignore[misc]
    """A composition that holds for neighbours that differ in one example, and for no groups.

    Examples whose noisy sums overlap are such a case: two of them are not two turns of one.

    Attributes:
        event: what is composed.
        count: how often.
        for_groups: an event of all of it that also holds for groups.
    """

    event: DpEvent
    count: int
    for_groups: DpEvent


if hasattr(dp_accounting.dp_event, "RandomAllocationDpEvent"):
    RandomAllocationDpEvent = dp_accounting.dp_event.RandomAllocationDpEvent
else:

    @attrs.frozen
    class RandomAllocationDpEvent(DpEvent):  # type: ignore[misc,no-redef]
        """One round of `num_steps` releases, of which an example joins `num_selected` at random.

        Every set of `num_selected` steps is equally likely, independently of the other examples.
        Newer versions of dp-accounting have this class.

        Attributes:
            event: each release, for an example that joins it.
            num_selected: how many releases an example joins.
            num_steps: how many releases there are.
        """

        event: DpEvent
        num_selected: int
        num_steps: int


@attrs.frozen
class TruncatedRandomAllocationDpEvent(DpEvent):  # type: ignore[misc]
    """One round of noisy sums, of which each example joins one at random while there is room.

    Where the other examples fill the batch of a step, one example more displaces another one, and
    moves the sum of that step by two clip bounds.

    Attributes:
        dataset_size: the number of examples.
        num_steps: the number of noisy sums.
        truncated_batch_size: the largest batch.
        noise_multiplier: standard deviation of the noise on a sum, divided by the clip bound.
    """

    dataset_size: int
    num_steps: int
    truncated_batch_size: int
    noise_multiplier: float

    def probability_of_full(self) -> float:
        """Returns the probability that the other examples fill a given batch."""
        import scipy.stats  # slow to import

        others = scipy.stats.binom(self.dataset_size - 1, 1 / self.num_steps)
        return float(others.sf(self.truncated_batch_size - 1))


def random_allocation_event(num_steps: int, noise_multiplier: float) -> DpEvent:
    """Returns the event of one round of noisy sums, of which each example joins one at random."""
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    return gaussian if num_steps == 1 else RandomAllocationDpEvent(gaussian, 1, num_steps)


@attrs.frozen
class LimitedPoissonDpEvent(DpEvent):  # type: ignore[misc]
    """A release from a Poisson batch that is drawn again while it is too large.

    So the batch has the distribution of a Poisson batch, given that it is not too large. Let n be
    the number of examples, q the sampling probability, K the largest size, and Z(n) the probability
    that a Poisson batch of n examples has at most K members. With one example more, a batch A of
    the others has the probability q^|A| (1 - q)^(n - |A|) / Z(n), and A with that example has
    q^(|A| + 1) (1 - q)^(n - 1 - |A|) / Z(n) if |A| < K. Without it, A has the probability
    q^|A| (1 - q)^(n - 1 - |A|) / Z(n - 1). So no example takes the place of another one. Compared
    with a Poisson batch of any size:

    - Removed: the likelihood ratio is at most Z(n - 1) / Z(n) times as large.
    - Added: the loss is at most as large where |A| < K, and -log(1 - q) at most where |A| = K.
    - Replaced, also by an empty example: given A, the example takes part with probability q or
      zero. The loss is at most as large.

    Attributes:
        event: the release from a Poisson batch of any size.
        dataset_size: the number of examples, those that are added included.
        sampling_probability: of an example.
        max_batch_size: the largest batch.
        group_size: how many examples are added or removed.
    """

    event: DpEvent
    dataset_size: int
    sampling_probability: float
    max_batch_size: int
    group_size: int = 1

    def log_ratio(self) -> float:
        """Returns by how much the loss of a removed group is larger than in a Poisson batch."""
        import scipy.stats  # slow to import

        # Z(n - 1) = Z(n) + q P(n - 1 examples give a batch of K). The ratio grows with n, so that
        # its power bounds that of a group.
        size, rate, largest = self.dataset_size, self.sampling_probability, self.max_batch_size
        log_full = scipy.stats.binom.logpmf(largest, size - 1, rate)
        log_fits = scipy.stats.binom.logcdf(largest, size, rate)
        # Z(n) is at least the probability of a batch of K. It may underflow.
        most = (size - largest) / (size * (1 - rate))
        share = min(math.exp(min(log_full - log_fits, 700.0)), most)
        return self.group_size * math.log1p(rate * share)

    def probability_of_crowding(self) -> float:
        """Returns the probability that the others leave too little room for the whole group."""
        import scipy.stats  # slow to import

        size = max(self.dataset_size - self.group_size, 0)
        others = scipy.stats.binom(size, self.sampling_probability)
        sizes = np.arange(
            max(self.max_batch_size - self.group_size + 1, 0), self.max_batch_size + 1
        )
        # As in `log_ratio`, where the probability to fit underflows; it is then one.
        log_fits = max(others.logcdf(self.max_batch_size), others.logpmf(self.max_batch_size))
        return min(float(np.exp(others.logpmf(sizes) - log_fits).sum()), 1.0)

    def loss_if_crowded(self) -> float:
        """Returns a bound on the loss of an added group, if the others leave too little room."""
        return -self.group_size * math.log1p(-self.sampling_probability)


def poisson_group_event(
    rate: float, noise_multiplier: float, size: int, *, most_without_displacing: int | None = None
) -> DpEvent:
    """Returns the event of one noisy sum that each member of a group joins independently.

    If more members take part than are given, each of them displaces another example.
    """
    import scipy.stats  # slow to import

    if rate == 1 and most_without_displacing is None:
        return dp_accounting.GaussianDpEvent(noise_multiplier / size)
    # Binomially many members take part, and j of them move the sum j times as far. A higher rate
    # only costs more.
    rate = max(rate, SMALLEST_GROUP_RATE / size)
    joined = np.arange(size + 1)
    probabilities = scipy.stats.binom.pmf(joined, size, rate)
    most = size if most_without_displacing is None else most_without_displacing
    moves = np.where(joined <= most, joined, 2 * joined)
    return dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
        noise_multiplier, tuple(map(float, moves)), tuple(map(float, probabilities))
    )


def limited_poisson_event(
    num_examples: int, sampling_rate: float, max_batch_size: int, noise_multiplier: float
) -> DpEvent:
    """Returns the event of one noisy sum over a Poisson batch of at most `max_batch_size`."""
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    poisson = dp_accounting.PoissonSampledDpEvent(sampling_rate, gaussian)
    if max_batch_size == num_examples:
        return poisson
    return LimitedPoissonDpEvent(poisson, num_examples, sampling_rate, max_batch_size)


def compose_passes(
    event_of_pass: Callable[[float], DpEvent],
    noise_multiplier: ScalarOrSchedule,
    num_steps: int,
    steps_per_pass: int = 1,
) -> DpEvent:
    """Returns the event of a run, from a function of the noise multiplier of one pass."""
    counts = count_passes(noise_multiplier, num_steps, steps_per_pass)
    events = [
        dp_accounting.SelfComposedDpEvent(event_of_pass(level), count)
        for level, count in counts.items()
    ]
    return events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)


def count_passes(
    noise_multiplier: ScalarOrSchedule, num_steps: int, steps_per_pass: int = 1
) -> dict[float, int]:
    """Returns how many passes have each noise multiplier; a pass that has begun counts."""
    if not isinstance(noise_multiplier, Schedule):
        return {noise_multiplier: -(-num_steps // steps_per_pass)}
    pieces = list(noise_multiplier.pieces(num_steps))
    if steps_per_pass == 1:
        counts = [(level, last - first) for level, first, last in pieces]
    else:
        counts = list(_smallest_of_each_pass(pieces, steps_per_pass))
    # Rounding is always down, to a level that occurs or lies on a geometric grid: less noise costs
    # more, so epsilon stays an upper bound.
    grid = sorted({level for level, _ in counts})
    if len(grid) > MAX_NOISE_LEVELS and grid[0] > 0:
        grid = [grid[0], *np.geomspace(grid[0], grid[-1], MAX_NOISE_LEVELS).tolist()[1:]]
    merged: dict[float, int] = {}
    for level, count in counts:
        level = grid[bisect.bisect_right(grid, level) - 1]
        merged[level] = merged.get(level, 0) + count
    return merged


def _smallest_of_each_pass(
    pieces: list[tuple[float, int, int]], steps_per_pass: int
) -> Iterator[tuple[float, int]]:
    """Yields a noise multiplier and a number of passes in which it is the smallest one."""
    # An example may take part at any step of a pass, so the pass is charged at its smallest noise.
    # Only the first and the last pass of a piece can contain another value.
    smallest: dict[int, float] = {}
    for level, first, last in pieces:
        first_pass, last_pass = first // steps_per_pass, (last - 1) // steps_per_pass
        for edge in {first_pass, last_pass}:
            smallest[edge] = min(level, smallest.get(edge, math.inf))
        if last_pass - first_pass > 1:
            yield level, last_pass - first_pass - 1
    yield from ((level, 1) for level in smallest.values())
