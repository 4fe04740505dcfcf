"""A plan in plain English, for readers who have not seen its JSON."""

import math
import textwrap
from typing import Any

from dpoptax import _serialize
from dpoptax._plan import Plan
from dpoptax.accounting import trade_off
from dpoptax.reports import round_up
from dpoptax.reports._clip import clip_and_gradient_noise
from dpoptax.reports._text import COMPARED, remark_on_delta, settings_in_words, without_guarantee
from dpoptax.schedules import Schedule

WIDTH = 94
PRIOR = 0.5


def plan_in_words(plan: Plan, epsilon: float) -> str:
    """Returns a table of the settings, and a paragraph on what they mean."""
    sampler = plan.sampler
    clip, _ = clip_and_gradient_noise(plan.clip, plan.noise_multiplier)
    rows = {
        "Guarantee": f"epsilon = {round_up(epsilon)} at delta = {plan.delta:.3g}"
        + remark_on_delta(plan.delta, sampler.num_examples, sampler.unit),
        "Protected": f"each single {sampler.unit} of {sampler.num_examples:,}",
        "Compared": COMPARED[sampler.relation].format(unit=sampler.unit),
        "Batches": settings_in_words(_serialize.encode(sampler)),
        "Clipping": settings_in_words(clip),
        "Noise": settings_in_words(_serialize.encode(plan.mechanism)),
        "Noise multiplier": _number(plan.noise_multiplier),
        "Steps": f"{plan.num_steps:,}",
    }
    if not isinstance(sampler.expected_batch_size, Schedule):
        passes = plan.num_steps * sampler.expected_batch_size / sampler.num_examples
        rows["Steps"] += (
            f": each {sampler.unit} takes part {_number(float(f'{passes:.3g}'))} times on average"
        )
    lines = ["Plan", ""]
    for name, text in rows.items():
        head = f"  {name:<16}  "
        lines += textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    lines += ["", *textwrap.wrap(_meaning(plan, epsilon), WIDTH)]
    return "\n".join(lines)


def _meaning(plan: Plan, epsilon: float) -> str:
    unit, size = plan.sampler.unit, plan.sampler.expected_batch_size
    step = (
        f"Each step draws {_number(size)} {unit}s on average. It clips the gradient of each, sums "
        "them, and adds noise whose standard deviation is "
        f"{_number(plan.gradient_noise_multiplier)} times the clip bound."
    )
    if not math.isfinite(epsilon):
        return f"{step} {without_guarantee(plan.noise_multiplier)}"
    # Without it, any epsilon would read as protection.
    belief = trade_off.posterior_belief(plan.privacy_loss(), PRIOR, plan.delta)
    instead = " rather than another one" if plan.sampler.relation == "replace_one" else ""
    return (
        f"{step} After all {plan.num_steps:,} steps, epsilon = {round_up(epsilon)} limits what "
        f"anybody can learn about one {unit}, even from the model and every noisy gradient "
        f"together. The belief of an attacker that it was used{instead} can rise from "
        f"{100 * PRIOR:.0f} % to at most {round_up(100 * belief, 1)} %, except with probability "
        f"{plan.delta:.3g}. `dpoptax report` says what else an attacker can reach."
    )


def _number(value: Any) -> str:
    if isinstance(value, Schedule):
        return f"between {value.min:.4g} and {value.max:.4g}"
    return f"{value:,.6g}"
