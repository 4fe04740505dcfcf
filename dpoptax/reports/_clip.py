"""The clip rule of a report, with the count noise that it leaves to the noise multiplier."""

from typing import Any

from dpoptax import _serialize
from dpoptax.clipping import StatefulClipRule
from dpoptax.clipping._count_noise import split_noise
from dpoptax.clipping._state import AnyClipRule
from dpoptax.schedules import ScalarOrSchedule


def clip_and_gradient_noise(
    clip: AnyClipRule, noise_multiplier: ScalarOrSchedule
) -> tuple[dict[str, Any], ScalarOrSchedule | None]:
    """Returns the record of a clip rule, and the noise multiplier of the gradients alone.

    The second one is None for a rule without state: then it is that of the step.
    """
    record = _serialize.encode_or_describe(clip)
    if not isinstance(clip, StatefulClipRule):
        return record, None
    split = split_noise(noise_multiplier, clip.count_noise)
    # The number, where the rule leaves it to the noise multiplier.
    return record | {"count_noise": _serialize.encode(split.count_noise)}, split.gradients
