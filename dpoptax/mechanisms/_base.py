"""The interface of a mechanism: how noise is added to the clipped sum."""

import math
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.clipping import ClipRule
from dpoptax.per_example import PerExampleGrads
from dpoptax.schedules import ScalarOrSchedule, as_schedule


@runtime_checkable
class Mechanism(Protocol):
    """The interface of a mechanism: `release`, `check` and `caveat`.

    The accountant treats every mechanism as Gaussian noise of standard deviation
    `noise_multiplier * clip.l2_clip` on the clipped sum. A mechanism must be at least as private as
    that. Write it as a frozen class with numbers as fields: the noise keys are derived from its
    fields.

    For clip rules with state, such as `dpoptax.clipping.QuantileClip`, a mechanism also needs
    `release_votes(key, votes, noise_multiplier, step, batch)`. It returns a sum of votes with
    noise, as a float32 number. `votes` is an int32 number to which each of the `batch` rows adds
    -1, 0 or 1, and the noise must be at least as private as Gaussian noise of standard deviation
    `noise_multiplier`, together with the noise of `release`.

    Example:
        >>> import dpoptax
        >>> isinstance(dpoptax.mechanisms.Gaussian(), Mechanism)
        True
    """

    @property
    def caveat(self) -> str:
        """What the privacy statement assumes about the noise; the report prints it."""

    def release(
        self,
        key: PRNGKeyArray,
        grads: PerExampleGrads,
        clip: ClipRule,
        noise_multiplier: ScalarOrSchedule,
        step: Int[Array, ""] | int,
    ) -> PyTree[Float[Array, "..."]]:
        """Returns the noisy clipped sum, in float32 or wider.

        Args:
            key: for this release and nothing else.
            grads: the per-example gradients of the batch.
            clip: the clip rule.
            noise_multiplier: standard deviation of the noise divided by the clip bound.
            step: the number of the release, for scheduled clips and noise.
        """

    def check(self, clip: ClipRule, noise_multiplier: ScalarOrSchedule) -> None:
        """Raises if the mechanism does not support this clip rule or noise.

        Args:
            clip: the clip rule.
            noise_multiplier: standard deviation of the noise divided by the clip bound.
        """


@runtime_checkable
class ReleasesVotes(Protocol):
    """A mechanism for clip rules with state; see `Mechanism`."""

    def release_votes(
        self,
        key: PRNGKeyArray,
        votes: Int[Array, ""],
        noise_multiplier: ScalarOrSchedule,
        step: Int[Array, ""] | int,
        batch: int,
    ) -> Float[Array, ""]:
        """Returns a sum of votes with noise; see `Mechanism`."""


def noise_stddev(
    clip: ClipRule, noise_multiplier: ScalarOrSchedule, step: Int[Array, ""] | int = 0
) -> float | Float[Array, ""]:
    """Returns the standard deviation of the noise on the clipped sum: multiplier times bound.

    Raises:
        ValueError: the bound is infinite and the multiplier is not zero.

    Example:
        >>> import dpoptax
        >>> noise_stddev(dpoptax.clipping.FlatClip(2.0), 1.5)
        3.0
    """
    noise, bound = as_schedule(noise_multiplier), as_schedule(clip.l2_clip)
    if noise.max == 0:
        # Before the product, because zero times an infinite bound is NaN.
        return 0.0
    if math.isinf(bound.max):
        raise ValueError(
            f"noise needs a finite l2_clip to be scaled by; got l2_clip=inf with "
            f"noise_multiplier={noise.max}. Pass a finite clip, or noise_multiplier=0."
        )
    return noise.at(step) * bound.at(step)
