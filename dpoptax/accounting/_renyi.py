"""A run as dp-accounting's Rényi accountant knows it: its events, and what is paid from delta."""

import math
from collections.abc import Sequence

import dp_accounting

from dpoptax._dp_events import (
    KnownBranchDpEvent,
    LimitedPoissonDpEvent,
    RandomAllocationDpEvent,
    TruncatedRandomAllocationDpEvent,
)
from dpoptax.accounting._normalize_event import normalize


def renyi_steps(
    event: dp_accounting.DpEvent, delta: float, orders: Sequence[float]
) -> tuple[list[dp_accounting.DpEvent], float]:
    """Returns events whose Rényi divergences of these orders bound those of the run.

    Also returns a probability.

    The probability is to be subtracted from delta: with it, a batch overflows. The events hold for
    examples that are added or removed, and not for replaced ones.
    """
    normalized = normalize(event, delta=delta)
    if not normalized.has_noise:
        return [dp_accounting.NonPrivateDpEvent()], 0.0
    steps = []
    for step, count in normalized.counts.items():
        match step:
            case dp_accounting.SampledWithoutReplacementDpEvent(
                source_dataset_size=size,
                sample_size=sample,
                event=dp_accounting.GaussianDpEvent(noise_multiplier=noise),
            ):
                # One example pushes another out of the batch: twice the clip bound.
                gaussian = dp_accounting.GaussianDpEvent(noise / 2)
                step = dp_accounting.PoissonSampledDpEvent(sample / size, gaussian)
            case LimitedPoissonDpEvent(event=unlimited):
                steps += _cost_of_limit(step, count, orders)
                step = unlimited
            case KnownBranchDpEvent(rare=rare):
                # An upper bound: as if the worse branch were always taken.
                step = rare.event if isinstance(rare, RandomAllocationDpEvent) else rare
            case TruncatedRandomAllocationDpEvent(noise_multiplier=noise):
                # An upper bound: as if the step were known, and its batch always full.
                step = dp_accounting.GaussianDpEvent(noise / 2)
            case _ if isinstance(step, RandomAllocationDpEvent):
                step = step.event  # an upper bound: as if the step were known
        steps.append(dp_accounting.SelfComposedDpEvent(step, count))
    return steps, normalized.overflow


def _cost_of_limit(
    step: LimitedPoissonDpEvent, count: int, orders: Sequence[float]
) -> list[dp_accounting.DpEvent]:
    """A Gaussian whose divergence bounds what limited batches add to that of Poisson batches."""
    removed, added = step.log_ratio(), step.loss_if_crowded()
    crowding = step.probability_of_crowding()
    # Added, the loss is at most `added` in any case, and larger than usual where others crowd the
    # batch: the moment of order a - 1 grows by the factor 1 + crowding (exp((a - 1) added) - 1).
    # A Gaussian of noise s has the divergence a / (2 s^2).
    precision = max(
        max(
            removed,
            min(crowding * math.expm1(min((order - 1) * added, 700.0)) / (order - 1), added),
        )
        / order
        for order in orders
    )
    if precision * count == 0:
        return []
    return [dp_accounting.GaussianDpEvent((2 * count * precision) ** -0.5)]
