"""A plan and the steps that ran in, the privacy statement that a person can read out."""

import importlib.metadata
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpoptax.plan import Plan


def statement(plan: "Plan", num_steps: int) -> str:
    """Returns the guarantee of `num_steps` steps of `plan`, with everything it rests on.

    Args:
        plan: what ran.
        num_steps: how many of its steps ran.

    Returns:
        Plain text, a line per fact.
    """
    epsilon = plan.epsilon(num_steps)
    replaced = plan.epsilon(num_steps, relation="replace_one")
    sampler = plan.sampler
    if math.isinf(epsilon):
        guarantee = "none: this run is not private (epsilon = inf)"
    else:
        guarantee = f"({epsilon:.3f}, {plan.delta:.3g})-differential privacy"
    version = importlib.metadata.version("dp-accounting")
    rows = {
        "guarantee": guarantee,
        "unit, relation": f"one {sampler.unit}, {sampler.relation}",
        "under replace_one": f"epsilon = {replaced:.3f} at the same delta",
        "released": "every noisy gradient, hence every iterate and the final parameters",
        "sampler": f"{type(sampler).__name__}, {sampler.expected_batch_size:g} expected of "
        f"{sampler.num_examples} {sampler.unit}s, at most {sampler.max_batch_size}",
        "l2_clip": f"{plan.clip_rule.l2_clip:g}",
        "noise_multiplier": f"{plan.noise_multiplier:.4f}",
        "steps": f"{num_steps} done of {plan.num_steps} planned",
        "accountant": f"privacy loss distribution, dp-accounting {version}",
        "not covered": "runs made to choose these settings; losses and other readings of the data; "
        "floating-point and generator effects",
    }
    width = max(map(len, rows))
    return "\n".join(
        ["Differential privacy", *(f"  {name:<{width}}  {text}" for name, text in rows.items())]
    )
