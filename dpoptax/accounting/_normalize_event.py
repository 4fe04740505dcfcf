"""Normal form of a dp-accounting event: its one-step events, and how often each ran.

Compositions are flattened. Gaussian steps are merged into one. A truncated Poisson batch that
practically never overflows becomes an untruncated one, and the rest is paid from delta. For groups,
the event of one example becomes the event of a group.
"""

from collections.abc import Iterator
from typing import Any

import attrs
import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent, TruncatedSubsampledGaussianDpEvent

from dpoptax._dp_events import (
    KnownBranchDpEvent,
    LimitedPoissonDpEvent,
    OneExampleDpEvent,
    RandomAllocationDpEvent,
    TruncatedRandomAllocationDpEvent,
    poisson_group_event,
    random_allocation_event,
)

# The largest fraction of delta that may pay for batches that overflow. It costs at most 0.2 % of
# epsilon or so; beyond it, the truncated batch itself is accounted, ten times slower.
OVERFLOW_FRACTION = 0.05
# Groups of which so many members take part in a step are told apart from larger ones.
FEW_MEMBERS = 2
# Noise below this counts as none: its square underflows.
SMALLEST_NOISE = 1e-150


@attrs.frozen
class NormalizedSteps:
    """The steps of a run.

    Attributes:
        counts: how often each one-step event ran.
        overflow: a probability, to be subtracted from delta, of everything that `counts` omits.
        has_noise: whether every step had noise. If not, the run has no guarantee and no counts.
    """

    counts: dict[dp_accounting.DpEvent, int]
    overflow: float
    has_noise: bool


def normalize(event: dp_accounting.DpEvent, *, delta: float) -> NormalizedSteps:
    """Returns the normal form of an event, for neighbours that differ in one example."""
    steps = _without_rare_overflow(event, delta, group_size=1)
    return attrs.evolve(steps, counts=_merge_gaussians(steps.counts))


def normalize_for_group(
    event: dp_accounting.DpEvent, *, delta: float, relation: NeighboringRelation, group_size: int
) -> NormalizedSteps | None:
    """Returns the normal form for neighbours that differ in a group; None where none is known."""
    steps = _without_rare_overflow(event, delta, group_size)
    if not steps.has_noise:
        return steps
    if relation == NeighboringRelation.REPLACE_ONE:
        return None
    counts: dict[dp_accounting.DpEvent, int] = {}
    for step, count in steps.counts.items():
        grouped = _group_event(step, group_size, relation)
        if grouped is None:
            return None
        # Different steps may have one event for groups, so that counts are added, not set.
        counts[grouped] = counts.get(grouped, 0) + count
    return attrs.evolve(steps, counts=_merge_gaussians(counts))


def _without_rare_overflow(
    event: dp_accounting.DpEvent, delta: float, group_size: int
) -> NormalizedSteps:
    """Flattens compositions, and replaces batches that rarely overflow where delta can pay."""
    counts: dict[dp_accounting.DpEvent, int] = {}
    for step, count in _flatten(event, 1, group_size):
        if _costs_nothing(step):
            continue
        if _has_no_noise(step):
            return NormalizedSteps({}, 0.0, has_noise=False)
        counts[step] = counts.get(step, 0) + count
    untruncated: dict[dp_accounting.DpEvent, int] = {}
    overflow = 0.0
    for step, count in counts.items():
        probability, usual = _split_overflow(step, group_size)
        overflow += count * probability
        _add(untruncated, usual, count, group_size)
    # Consider the event that at some step the *other* examples fill the batch. It has the same
    # probability on both neighbours. Without it, the mechanism is the untruncated one; its
    # probability is paid from delta.
    if overflow <= OVERFLOW_FRACTION * delta:
        return NormalizedSteps(untruncated, overflow, has_noise=True)
    truncated: dict[dp_accounting.DpEvent, int] = {}
    for step, count in counts.items():
        _add(truncated, step, count, group_size)
    return NormalizedSteps(truncated, 0.0, has_noise=True)


def _add(
    counts: dict[dp_accounting.DpEvent, int],
    event: dp_accounting.DpEvent,
    count: int,
    group_size: int,
) -> None:
    """Adds the one-step events of an event to the counts."""
    if isinstance(event, KnownBranchDpEvent) and _is_composed(event.rare):
        # The branch is one for all steps, so that steps are not independent of each other.
        event = event.rare
    for step, times in _flatten(event, count, group_size):
        if not _costs_nothing(step):
            counts[step] = counts.get(step, 0) + times


def _is_composed(event: dp_accounting.DpEvent) -> bool:
    return isinstance(event, dp_accounting.SelfComposedDpEvent | dp_accounting.ComposedDpEvent)


def _flatten(
    event: dp_accounting.DpEvent, count: int, group_size: int
) -> Iterator[tuple[dp_accounting.DpEvent, int]]:
    """Yields the one-step events of nested compositions, and their counts."""
    match event:
        case OneExampleDpEvent(for_groups=inner) if group_size > 1:
            yield from _flatten(inner, count * int(event.count), group_size)
        case dp_accounting.SelfComposedDpEvent(event=inner, count=times):
            yield from _flatten(inner, count * int(times), group_size)
        case dp_accounting.ComposedDpEvent(events=events):
            for inner in events:
                yield from _flatten(inner, count, group_size)
        case MixtureOfGaussiansDpEvent():
            # Tuples, because events are keys of dictionaries and lists cannot be hashed.
            yield (
                MixtureOfGaussiansDpEvent(
                    event.standard_deviation,
                    tuple(event.sensitivities),
                    tuple(event.sampling_probs),
                ),
                count,
            )
        case _ if isinstance(event, RandomAllocationDpEvent):
            yield _of_one_selected(event), count * int(event.num_selected)
        case _ if count > 0:
            yield event, count


def holds_for_groups(event: dp_accounting.DpEvent) -> bool:
    """Returns whether no part of an event is about one example only."""
    match event:
        case OneExampleDpEvent():
            return False
        case dp_accounting.SelfComposedDpEvent(event=inner):
            return holds_for_groups(inner)
        case dp_accounting.ComposedDpEvent(events=events):
            return all(map(holds_for_groups, events))
    return True


def _of_one_selected(event: Any) -> dp_accounting.DpEvent:
    """Returns a round in which an example joins one step; `num_selected` of them are as costly.

    Draw k disjoint sets of t // k steps at random, and let the example join one step of each. This
    is a random set of k steps. An adversary who knows the sets sees k rounds (Feldman and Shenfeld
    2025, arXiv:2502.08202).
    """
    selected, steps = int(event.num_selected), int(event.num_steps)
    if not 1 <= selected <= steps:
        raise ValueError(
            f"num_selected must be from 1 to num_steps; got {selected} of {steps} steps."
        )
    if selected == 1 and steps > 1:
        return event
    steps //= selected
    return event.event if steps == 1 else RandomAllocationDpEvent(event.event, 1, steps)


def _has_no_noise(step: dp_accounting.DpEvent) -> bool:
    if isinstance(step, dp_accounting.NonPrivateDpEvent):
        return True
    if _is_composed(step):
        return any(_has_no_noise(inner) for inner, _ in _flatten(step, 1, group_size=1))
    if isinstance(step, KnownBranchDpEvent):
        fails = isinstance(step.rare, dp_accounting.NonPrivateDpEvent)
        return _has_no_noise(step.usual) or (not fails and _has_no_noise(step.rare))
    if isinstance(step, LimitedPoissonDpEvent):
        return _has_no_noise(step.event)
    inner = getattr(step, "event", step)
    names = ("noise_multiplier", "noise_parameter", "standard_deviation")
    return any(abs(getattr(inner, name, 1.0)) < SMALLEST_NOISE for name in names)


def _costs_nothing(step: dp_accounting.DpEvent) -> bool:
    if isinstance(step, dp_accounting.NoOpDpEvent):
        return True
    return getattr(step, "sampling_probability", None) == 0


def _split_overflow(
    step: dp_accounting.DpEvent, group_size: int
) -> tuple[float, dp_accounting.DpEvent]:
    """The probability that the other examples leave no room for a group, and the event if not."""
    match step:
        case TruncatedSubsampledGaussianDpEvent(
            dataset_size=size,
            sampling_probability=rate,
            truncated_batch_size=max_batch_size,
            noise_multiplier=noise_multiplier,
        ):
            import scipy.stats  # slow to import

            others = max(size - group_size, 0)
            overflow = float(scipy.stats.binom.sf(max_batch_size - group_size, others, rate))
            gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
            return overflow, dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        case KnownBranchDpEvent(usual=usual, probability=overflow) if group_size == 1:
            return overflow, usual
        case TruncatedRandomAllocationDpEvent(
            num_steps=steps, noise_multiplier=noise_multiplier
        ) if group_size == 1:
            overflow = min(steps * step.probability_of_full(), 1.0)
            return overflow, random_allocation_event(steps, noise_multiplier)
    return 0.0, step


def _group_event(
    step: dp_accounting.DpEvent, size: int, relation: NeighboringRelation
) -> dp_accounting.DpEvent | None:
    """The event of a step for a group that is added or removed; its members join independently."""
    match step:
        case dp_accounting.GaussianDpEvent(noise_multiplier=noise):
            return dp_accounting.GaussianDpEvent(noise / size)
        case KnownBranchDpEvent(rare=rare):
            # Its probability is that for one example, so that for groups the worse branch counts.
            return _group_event(rare, size, relation)
        case LimitedPoissonDpEvent(event=usual):
            grouped = _group_event(usual, size, relation)
            return None if grouped is None else attrs.evolve(step, event=grouped, group_size=size)
        case dp_accounting.PoissonSampledDpEvent(
            sampling_probability=rate, event=dp_accounting.GaussianDpEvent(noise_multiplier=noise)
        ):
            return poisson_group_event(rate, noise, size)
        case TruncatedSubsampledGaussianDpEvent(sampling_probability=rate, noise_multiplier=noise):
            # Each member who takes part may displace another example, if the others leave too
            # little room for all who do. How many do does not depend on who else is in the batch.
            few = min(FEW_MEMBERS, size)
            for_all, for_few = (_split_overflow(step, members)[0] for members in (size, few))
            if for_all == 0:
                return poisson_group_event(rate, noise, size)
            if relation != NeighboringRelation.ADD_OR_REMOVE_ONE:
                return _crowded_with_empty_members(rate, noise, size, for_all)
            crowded = KnownBranchDpEvent(
                poisson_group_event(rate, noise, size, most_without_displacing=few),
                poisson_group_event(rate, noise, size, most_without_displacing=0),
                min(for_few / for_all, 1.0),
            )
            return KnownBranchDpEvent(poisson_group_event(rate, noise, size), crowded, for_all)
    return None


def _crowded_with_empty_members(
    rate: float, noise_multiplier: float, size: int, crowded: float
) -> dp_accounting.DpEvent:
    """The same where members that are not there take a place in the batch, and add nothing to it.

    Both neighbours then displace other examples, so that neither of them is the batch without the
    group. But both have the same examples in the batch: an adversary who knows them sees sums that
    differ by the members among them.
    """
    import scipy.stats  # slow to import

    joins, many = (float(scipy.stats.binom.sf(most, size, rate)) for most in (0, FEW_MEMBERS))
    members: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise_multiplier / size)
    if size > FEW_MEMBERS and joins > 0:
        few = dp_accounting.GaussianDpEvent(noise_multiplier / FEW_MEMBERS)
        members = KnownBranchDpEvent(few, members, min(many / joins, 1.0))
    return KnownBranchDpEvent(
        poisson_group_event(rate, noise_multiplier, size), members, crowded * joins
    )


def _merge_gaussians(counts: dict[dp_accounting.DpEvent, int]) -> dict[dp_accounting.DpEvent, int]:
    """Replaces all steps in which every example takes part by one Gaussian step."""
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
