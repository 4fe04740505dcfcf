"""Split of the noise multiplier of a step between its gradient and the votes of a clip rule.

At each step, a rule with state releases two sums over the batch: the clipped gradients, and the
votes of -1, 0 or 1. Let the noise have the standard deviations u C on the gradients, with the clip
bound C, and v on the votes. Divide the first sum by u C and the second one by v. Together they are
one sum over the batch, with noise N(0, I), and the term of an example has a squared norm of at most

    (C / (u C))^2 + (1 / v)^2 = 1 / u^2 + 1 / v^2 = 1 / z^2.

So both releases together are the Gaussian mechanism with noise multiplier z, on terms of norm one.
This is a statement about the term of a single example, so it holds under every neighbouring
relation, and for groups. An example that joins, leaves, or gives way to an empty one moves the
joint sum by one such term. An example that replaces another one moves it by two: the gradients by
2 C, the votes by 2. It also holds under every sampler, because both sums use the same batch. C may
depend on earlier releases, as the parameters do.

Andrew et al. 2021 (arXiv:1905.03871, theorem 1) count the examples below the bound. A vote is twice
an indicator that is shifted by one half, so v is twice the noise on the count.
"""

import fractions
import math
from typing import NamedTuple

from dpoptax.schedules import ScalarOrSchedule, Schedule, as_schedule

# Without another choice, the noise on the count is five noise multipliers. That leaves 99 % of the
# budget to the gradient, whose noise grows by .5 %.
DEFAULT_RATIO = 5.0


class NoiseSplit(NamedTuple):
    """The noise of one step. Both are schedules if the noise multiplier of the step is one.

    Attributes:
        gradients: noise multiplier of the gradients, relative to the clip bound.
        votes: standard deviation of the noise on the sum of the votes.
    """

    gradients: ScalarOrSchedule
    votes: ScalarOrSchedule

    @property
    def count_noise(self) -> ScalarOrSchedule:
        """Standard deviation of the noise on a count of examples: half of that on the votes."""
        if not isinstance(self.votes, Schedule):
            return self.votes / 2
        return Schedule(tuple(value / 2 for value in self.votes.values), self.votes.lengths)


def split_noise(noise_multiplier: ScalarOrSchedule, count_noise: float | None) -> NoiseSplit:
    """Returns the noise of the gradients and of the votes of a step.

    Args:
        noise_multiplier: of the whole step. Where it is zero, so is all noise.
        count_noise: half the standard deviation of the noise on the votes; None chooses it.

    Raises:
        ValueError: the votes alone cost more than the step may.
    """
    steps = as_schedule(noise_multiplier)
    both = [_split(value, count_noise) for value in steps.values]
    if not isinstance(noise_multiplier, Schedule):
        return NoiseSplit(*both[0])
    gradients, votes = zip(*both, strict=True)
    return NoiseSplit(Schedule(gradients, steps.lengths), Schedule(votes, steps.lengths))


def _split(noise_multiplier: float, count_noise: float | None) -> tuple[float, float]:
    if noise_multiplier == 0:
        return 0.0, 0.0
    count = DEFAULT_RATIO * noise_multiplier if count_noise is None else count_noise
    gradients = multiplier_of_gradients(noise_multiplier, 2 * count)
    if gradients is None:
        raise ValueError(
            f"count_noise must exceed half of noise_multiplier, {noise_multiplier / 2:g}; got "
            f"{count:g}: the count alone would cost more than the whole step may. Pass a larger "
            f"count_noise, such as {DEFAULT_RATIO * noise_multiplier:g}, or leave it out."
        )
    return gradients, 2 * count


def multiplier_of_gradients(noise_multiplier: float, votes: float) -> float | None:
    """Returns u with u**-2 + votes**-2 <= noise_multiplier**-2; None if there is none."""
    budget = fractions.Fraction(noise_multiplier) ** -2 - fractions.Fraction(votes) ** -2
    if budget <= 0:
        return None
    # In units of the noise multiplier, whose own square may be too small or too large for a float.
    rest = float(budget * fractions.Fraction(noise_multiplier) ** 2)
    found = noise_multiplier / math.sqrt(rest)
    # Floating point rounds either way, and an exact mechanism needs an exact inequality.
    while fractions.Fraction(found) ** -2 > budget:
        found = math.nextafter(found, math.inf)
    return found
