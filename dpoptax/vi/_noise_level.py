"""The noise of the releases of a plan, for plans with the same noise in every step."""

from typing import Any

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax.clipping import FlatClip
from dpoptax.mechanisms import DiscreteGaussian, Gaussian
from dpoptax.vi._likelihood_of_releases import NoiseLevel


def noise_level(plan: Plan, num_examples: int) -> NoiseLevel:
    """Returns the noise of one release; refuses a plan whose noise changes, or has memory."""
    clip = plan.clip.l2_clip if isinstance(plan.clip, FlatClip) else plan.clip
    l2_clip = _constant("clip", clip)
    noise_multiplier = _constant("noise_multiplier", plan.noise_multiplier)
    batch_size = _constant("expected_batch_size", plan.sampler.expected_batch_size)
    if not isinstance(plan.mechanism, Gaussian | DiscreteGaussian):
        raise ValueError(
            "the releases must have independent noise; got the mechanism "
            f"{_validate.described(plan.mechanism)}. Use dpoptax.mechanisms.Gaussian()."
        )
    if noise_multiplier == 0:
        raise ValueError("the plan adds no noise, so there is no privacy noise to account for.")
    if plan.sampler.num_examples != num_examples:
        raise ValueError(
            f"the plan has {plan.sampler.num_examples} examples, but the objective {num_examples}."
        )
    return NoiseLevel(
        stddev=noise_multiplier * l2_clip / batch_size,
        batch=max(0.0, 1 - batch_size / num_examples) / batch_size,
        num_examples=num_examples,
        l2_clip=l2_clip,
    )


def _constant(name: str, value: Any) -> float:
    if not isinstance(value, int | float):
        raise ValueError(
            f"{name} must be one number for all steps, so that all releases have the same noise; "
            f"got {_validate.described(value)}."
        )
    return float(value)
