"""The interface of a mechanism: how noise is added to the clipped sum."""

import math
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax.clipping import ClipRule
from dpoptax.per_example import PerExampleGrads
from dpoptax.schedules import Scheduled, at, extremes


@runtime_checkable
class Mechanism(Protocol):
    """What `privatize` asks of a mechanism."""

    @property
    def caveat(self) -> str:
        """What a privacy statement about it takes on trust, for the report."""

    def release(
        self,
        key: PRNGKeyArray,
        grads: PerExampleGrads,
        clip: ClipRule,
        noise_multiplier: Scheduled,
        step: Int[Array, ""] | int,
    ) -> PyTree[Float[Array, "..."]]:
        """Returns the clipped sum with its noise, in float32 or wider."""

    def check(self, clip: ClipRule, noise_multiplier: Scheduled) -> None:
        """Refuses a clip or a noise that cannot be served."""


def noise_stddev(
    clip: ClipRule, noise_multiplier: Scheduled, step: Int[Array, ""] | int = 0
) -> float | Float[Array, ""]:
    """Returns the standard deviation of the noise on the clipped sum: multiplier times bound.

    Args:
        clip: the rule that clips.
        noise_multiplier: zero or more.
        step: where one of the two is a schedule.

    Returns:
        A number in the unit of the gradient.

    Raises:
        ValueError: the bound is infinite and the multiplier is not zero.

    Example:
        >>> import dpoptax
        >>> noise_stddev(dpoptax.clipping.FlatClip(2.0), 1.5)
        3.0
    """
    _, most_noise = extremes(noise_multiplier)
    if most_noise == 0:
        return 0.0
    _, largest = extremes(clip.l2_clip)
    if math.isinf(largest):
        raise ValueError(
            f"noise needs a finite l2_clip to be scaled by; got l2_clip=inf with "
            f"noise_multiplier={most_noise}. Pass a finite clip, or noise_multiplier=0."
        )
    return at(noise_multiplier, step) * at(clip.l2_clip, step)
