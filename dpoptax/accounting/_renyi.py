"""A run as dp-accounting's Rényi accountant knows it: its events, and what is paid from delta."""

import dp_accounting

from dpoptax._dp_events import (
    KnownBranchDpEvent,
    RandomAllocationDpEvent,
    TruncatedRandomAllocationDpEvent,
)
from dpoptax.accounting._normalize_event import normalize


def renyi_steps(
    event: dp_accounting.DpEvent, delta: float
) -> tuple[list[dp_accounting.DpEvent], float]:
    """Returns events whose Rényi divergence bounds that of the run, and a probability.

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
            case KnownBranchDpEvent(rare=rare):
                # An upper bound: as if the worse branch were always taken.
                step = rare
            case TruncatedRandomAllocationDpEvent(noise_multiplier=noise):
                # An upper bound: as if the step were known, and its batch always full.
                step = dp_accounting.GaussianDpEvent(noise / 2)
            case _ if isinstance(step, RandomAllocationDpEvent):
                step = step.event  # an upper bound: as if the step were known
        steps.append(dp_accounting.SelfComposedDpEvent(step, count))
    return steps, normalized.overflow
