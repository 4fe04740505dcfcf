"""Any dp-accounting event in; its one-step events and how often each ran out, made ready.

Made ready means: compositions are flattened, Gaussians folded into one, batches that practically
never overflow taken for what they then are, and groups put in the place of single examples.
"""

import dataclasses
from collections.abc import Iterator

import dp_accounting
import numpy as np
import scipy.stats
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent, TruncatedSubsampledGaussianDpEvent

from dpoptax._dp_events import KnownMixtureDpEvent

# The share of delta that may pay for batches beyond their capacity before the exact law of
# truncation, ten times slower to compute, is taken instead. It costs epsilon about 0.2 % at most.
OVERFLOW_SHARE = 0.05
# At which a member of a group is taken to join at least.
LEAST_RATE = 1e-7
# Noise below this counts as none: its square underflows.
LEAST_NOISE = 1e-150


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a run consists of.

    Attributes:
        counts: one-step events and how often each ran.
        overflow: the probability, paid from delta, of what `counts` leave out.
        private: whether every step had noise.
    """

    counts: dict[dp_accounting.DpEvent, int]
    overflow: float
    private: bool


def pieces(
    event: dp_accounting.DpEvent,
    *,
    delta: float,
    relation: NeighboringRelation,
    group_size: int = 1,
) -> Pieces | None:
    """Takes an event apart.

    Args:
        event: of any kind.
        delta: at which the run will be accounted; of it, a small share may pay for overflow.
        relation: which data sets count as neighbours.
        group_size: how many examples neighbours differ in.

    Returns:
        The pieces; None where the law of a group is not known.
    """
    counts: dict[dp_accounting.DpEvent, int] = {}
    private = True
    for step, count in _flatten(event, 1):
        if _costs_nothing(step):
            continue
        private = private and not _has_no_noise(step)
        counts[step] = counts.get(step, 0) + count
    if not private:
        return Pieces({}, 0.0, private=False)
    untruncated: dict[dp_accounting.DpEvent, int] = {}
    overflow = 0.0
    for step, count in counts.items():
        probability, without = _without_overflow(step, group_size)
        overflow += count * probability
        untruncated[without] = untruncated.get(without, 0) + count
    if overflow <= OVERFLOW_SHARE * delta:
        # Given that at no step the *other* examples fill the batch, which has the same
        # probability on both neighbours, the mechanism is the untruncated one; what is left
        # is paid from delta.
        counts = untruncated
    else:
        overflow = 0.0
    if group_size > 1:
        if relation == NeighboringRelation.REPLACE_ONE:
            return None
        counts = {_of_group(step, group_size): count for step, count in counts.items()}
        if None in counts:
            return None
    return Pieces(_fold_gaussians(counts), overflow, private)


def _flatten(
    event: dp_accounting.DpEvent, count: int
) -> Iterator[tuple[dp_accounting.DpEvent, int]]:
    match event:
        case dp_accounting.SelfComposedDpEvent(event=inner, count=times):
            yield from _flatten(inner, count * int(times))
        case dp_accounting.ComposedDpEvent(events=events):
            for inner in events:
                yield from _flatten(inner, count)
        case MixtureOfGaussiansDpEvent():  # hashable, also where it was made of lists
            yield (
                MixtureOfGaussiansDpEvent(
                    event.standard_deviation,
                    tuple(event.sensitivities),
                    tuple(event.sampling_probs),
                ),
                count,
            )
        case _ if count > 0:
            yield event, count


def _has_no_noise(step: dp_accounting.DpEvent) -> bool:
    if isinstance(step, dp_accounting.NonPrivateDpEvent):
        return True
    if isinstance(step, KnownMixtureDpEvent):
        return _has_no_noise(step.usual) or _has_no_noise(step.rare)
    inner = getattr(step, "event", step)
    names = ("noise_multiplier", "noise_parameter", "standard_deviation")
    return any(abs(getattr(inner, name, 1.0)) < LEAST_NOISE for name in names)


def _costs_nothing(step: dp_accounting.DpEvent) -> bool:
    if isinstance(step, dp_accounting.NoOpDpEvent):
        return True
    return getattr(step, "sampling_probability", None) == 0


def _without_overflow(
    step: dp_accounting.DpEvent, group_size: int
) -> tuple[float, dp_accounting.DpEvent]:
    """The probability that the others leave no room for a group, and the event where they do."""
    match step:
        case TruncatedSubsampledGaussianDpEvent(
            dataset_size=size,
            sampling_probability=rate,
            truncated_batch_size=capacity,
            noise_multiplier=noise_multiplier,
        ):
            others = max(size - group_size, 0)
            overflow = float(scipy.stats.binom.sf(capacity - group_size, others, rate))
            gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
            return overflow, dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        case KnownMixtureDpEvent(usual=usual, probability=overflow) if group_size == 1:
            return overflow, usual
    return 0.0, step


def _of_group(step: dp_accounting.DpEvent, size: int) -> dp_accounting.DpEvent | None:
    """The law of a step for examples that all join or leave; each joins on its own."""
    match step:
        case dp_accounting.GaussianDpEvent(noise_multiplier=noise):
            return dp_accounting.GaussianDpEvent(noise / size)
        case KnownMixtureDpEvent(rare=rare):  # always, for the probability is that of one
            return _of_group(rare, size)
        case dp_accounting.PoissonSampledDpEvent(
            sampling_probability=rate, event=dp_accounting.GaussianDpEvent(noise_multiplier=noise)
        ):
            # Far below, dp-accounting takes a group that hardly joins for one that never does; a
            # higher rate only costs more.
            rate = max(rate, LEAST_RATE / size)
            joined = np.arange(size + 1)
            probabilities = scipy.stats.binom.pmf(joined, size, rate)
            return MixtureOfGaussiansDpEvent(
                noise, tuple(map(float, joined)), tuple(map(float, probabilities))
            )
    return None


def _fold_gaussians(counts: dict[dp_accounting.DpEvent, int]) -> dict[dp_accounting.DpEvent, int]:
    """Gaussians compose to one Gaussian, and everyone in every batch is one."""
    rest, precision = {}, 0.0
    for step, count in counts.items():
        match step:
            case dp_accounting.GaussianDpEvent(noise_multiplier=noise):
                precision += count * (1 / noise) * (1 / noise)
            case dp_accounting.PoissonSampledDpEvent(
                sampling_probability=1.0,
                event=dp_accounting.GaussianDpEvent(noise_multiplier=noise),
            ):
                precision += count * (1 / noise) * (1 / noise)
            case _:
                rest[step] = count
    if precision:
        rest[dp_accounting.GaussianDpEvent(precision**-0.5)] = 1
    return rest
