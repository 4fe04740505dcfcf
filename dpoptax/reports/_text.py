"""Wording of the privacy report, for readers who are not specialists.

Every number is rounded such that the statement stays true: epsilon and probabilities of success
are rounded up.
"""

import math
import re
import textwrap
from typing import Any

from dpoptax import _serialize
from dpoptax.reports._attack import attack_in_words, rows_of_attack
from dpoptax.reports._best_attacker import attacks_of
from dpoptax.reports._correlated import rows_of
from dpoptax.reports._round import round_up, round_up_significant
from dpoptax.reports._values import ReportValues
from dpoptax.schedules import ScalarOrSchedule, as_schedule

WIDTH = 110
# A rule may have a bound for each of many parameters. The JSON has all of them.
MAX_ITEMS = 8
NO_PRNG = "none drawn yet: this is the report of a plan"
UNKNOWN_PRNG = "not stated"
# The conditions of every statement, and between them one on the end of the run.
KEYS = "The random keys are secret, and no key was used for two runs."
OTHER_RUNS = (
    "Other runs on the same data are not counted, for example runs to choose the model or its "
    "settings. Each of them reveals more."
)
RUNS_OF_A_SEARCH = (
    "The number of runs of the search was drawn at random from the stated distribution. It is "
    "secret, and so are all runs but the best one, their scores, and the time of the search.",
    "Each run cost at most what is counted here, its score included. A score that read the data "
    "that are protected was noisy, and was charged.",
    "Runs on the same data outside of the search are not counted. Each of them reveals more.",
)
END_WITHOUT_LOOKING = (
    "Nothing that was released during the run decided when the run ended. Otherwise, for example "
    "if the run ended at a good accuracy, the epsilon of all planned steps holds."
)
END_AFTER_LOOKING = (
    "Whoever decided when the run ended used only what was released, and data that are not the "
    "training data. For example, a decision by the training loss is not covered."
)
NOT_PROTECTED = (
    "Losses, gradient norms, batch sizes and the time of a step are not protected. Keep them "
    "secret."
)
# The two data sets that a guarantee compares.
COMPARED = {
    "add_or_remove_one": "the data with and without this {unit}",
    "replace_special": "the data with this {unit}, or with an empty one in its place",
    "replace_one": "the data with this {unit}, or with any other one in its place",
}


def assumptions(covers_all_steps: bool, is_search: bool) -> tuple[str, ...]:
    """Returns the conditions of a statement that do not depend on the mechanism."""
    end = END_AFTER_LOOKING if covers_all_steps else END_WITHOUT_LOOKING
    runs = RUNS_OF_A_SEARCH if is_search else (OTHER_RUNS,)
    return (KEYS, *runs, end, NOT_PROTECTED)


def as_text(values: ReportValues) -> str:
    """Returns the whole report."""
    sections = {
        "Privacy report": _guarantee(values),
        "Epsilon under other conditions": _other_epsilons(values),
        "What the best possible attacker can find out": attacks_of(values),
    }
    if values.attack is not None:
        sections["What an attack reached"] = rows_of_attack(values.attack)
    # One column for all sections.
    width = max(len(name) for rows in sections.values() for name in rows)
    lines = []
    for title, rows in sections.items():
        lines += [title, ""]
        for name, text in rows.items():
            lines += _wrap(text, f"  {name:<{width}}  ")
        lines.append("")
    lines.append("This holds under the following conditions")
    lines.append("")
    for text in values.assumptions:
        lines += _wrap(_as_sentence(text), "  - ")
    return "\n".join([*lines, "", "In plain words", "", *_wrap(in_words(values), "  ", 94)])


def in_words(values: ReportValues) -> str:
    """Returns one paragraph for a reader who knows no formula."""
    unit = values.unit
    if math.isinf(values.epsilon):
        return without_guarantee(values.noise_multiplier)
    # The first rate and prior are those that the paragraph names; the rows list all.
    rate, found = next(iter(values.true_positive_rate.items()))
    prior, belief = next(iter(values.posterior_belief.items()))
    instead = " rather than another one" if values.relation == "replace_one" else ""
    chance = math.floor(1 / values.delta + 1e-6)  # rounded down, so that 1 / chance >= delta
    correct = round_up(50 + 50 * values.advantage, 1)
    return (
        f"{_used(values)} Random noise limits how much the "
        f"released result can depend on any one of them. Suppose that an attacker knows all other "
        f"{unit}s, sees everything that was released, and wants to know whether one particular "
        f"{unit} was used{instead}. If yes and no are equally likely at first, the attacker's "
        f"answer is correct in at most {correct} of 100 cases. A guess without any information is "
        f"correct in 50 of 100. Suppose next that the attacker may be wrong about 1 in "
        f"{round(1 / rate):,} of the {unit}s that were not used. Then the attacker recognizes at "
        f"most {_per_thousand(found)} of the {unit}s that were used. Suppose last that the "
        f"attacker believed, before the release, with a probability of {100 * prior:.0f} % that "
        f"the {unit} was used. The release can raise this belief to at most "
        f"{round_up(100 * belief, 1)} %, with an exception that has a probability of at most 1 in "
        f"{chance:,}. All this holds whatever else the attacker knows, now or later, and however "
        f"much the attacker computes. It does not limit what the other {unit}s reveal about this "
        f"one, such as a pattern that they all have in common.{attack_in_words(values.attack)}"
    )


def without_guarantee(noise_multiplier: ScalarOrSchedule) -> str:
    """What an infinite epsilon means."""
    # Infinite with noise: the noise is so small that the accountant finds no bound.
    if as_schedule(noise_multiplier).min > 0:
        return (
            "For this run no finite epsilon can be shown at this delta, so that nothing can be "
            "promised. Add more noise, or take a larger max_batch_size."
        )
    return (
        "This run is not private: at least one step had no noise, so it protects nobody. Treat "
        "everything that it released like the data itself."
    )


def remark_on_delta(delta: float, num_units: int, unit: str) -> str:
    """What follows a guarantee whose delta is too large; else nothing."""
    if delta <= 1 / num_units:
        return ""
    return (
        f". This delta is too large: it is above 1 / {num_units:,}, and a program that "
        f"publishes one {unit} at random would meet it"
    )


def _used(values: ReportValues) -> str:
    """The first sentence in plain words."""
    if values.noisy_num_units:
        return (
            f"The data have about {values.num_units:,} {values.unit}s: the exact number is "
            "private, and this one has noise."
        )
    return f"The training used {values.num_units:,} {values.unit}s."


def _number_of_units(values: ReportValues) -> str:
    return f"{'about ' * values.noisy_num_units}{values.num_units:,}"


def _guarantee(values: ReportValues) -> dict[str, str]:
    """What was promised, and for which run."""
    if math.isinf(values.epsilon):
        guarantee = "none (epsilon = inf)"
    else:
        guarantee = (
            f"({round_up(values.epsilon)}, {round_up_significant(values.delta)})"
            "-differential privacy (epsilon, delta)"
        )
        if values.covers_all_steps:
            guarantee += (
                f". This counts all {values.steps_planned:,} planned steps, because something that "
                "was released may have decided when the run ended"
            )
    guarantee += remark_on_delta(values.delta, values.num_units, values.unit)
    # Charged steps that are not part of the result still reveal something.
    lost = ""
    if values.steps_lost:
        lost = f", and {values.steps_lost:,} lost in a crash, which count as released"
    compared = COMPARED[values.relation].format(unit=values.unit)
    return {
        "Guarantee": guarantee,
        **_search(values),
        "Who is protected": f"each single {values.unit} of {_number_of_units(values)}",
        "What is compared": f"{compared} ({values.relation})",
        "What was released": values.released,
        "Sampling": settings_in_words(values.sampler),
        **_bound_and_noise(values),
        "Steps": f"{values.steps_done:,} done of {values.steps_planned:,} planned{lost}",
        "Random numbers": values.prng,
        "Calculated with": values.accountant,
    }


def _search(values: ReportValues) -> dict[str, str]:
    """The search that this run is the best one of."""
    if values.runs is None:
        return {}
    mean, shape = values.runs["mean"], values.runs["shape"]
    names = {0.0: "logarithmic", 1.0: "geometric", "inf": "Poisson"}
    name = names.get(shape, f"negative binomial of shape {shape}")
    alone = round_up(values.epsilon_of_one_run)
    return {
        "Search": f"the best of K runs, K random with mean {mean:g} ({name}). Every number here is "
        f"that of the whole search; one run alone costs epsilon {alone}"
    }


def _bound_and_noise(values: ReportValues) -> dict[str, str]:
    """How gradients are clipped, and what is added to their sum."""
    multiplier = _short(_serialize.encode(values.noise_multiplier))
    follows, of_whole_step = "", ""
    if values.gradient_noise_multiplier is not None:
        gradients = _short(_serialize.encode(values.gradient_noise_multiplier))
        follows = ". It follows noisy counts, one of each step"
        of_whole_step = (
            f" of the gradient and the count together, {gradients} of the gradient alone"
        )
    return {
        "Clipping": f"{settings_in_words(values.clip)}: the bound on what one {values.unit} "
        f"contributes to a step{follows}",
        "Noise": settings_in_words(values.mechanism),
        **rows_of(values),
        "Noise multiplier": f"{multiplier}{of_whole_step}: the standard deviation of the noise, "
        "divided by that bound",
    }


def _other_epsilons(values: ReportValues) -> dict[str, str]:
    """The same run, under other conditions."""
    deltas = ", ".join(
        f"{round_up(value)} at delta {round_up_significant(delta)}"
        for delta, value in values.epsilon_by_delta.items()
    )
    groups = ", ".join(
        f"{round_up(value)} for {size} {values.unit}s"
        for size, value in values.epsilon_by_group_size.items()
    )
    delta = round_up_significant(values.delta)
    replaced, unamplified = (
        round_up(values.epsilon_replace_one),
        round_up(values.epsilon_unamplified),
    )
    of_steps_done = {}
    if values.covers_all_steps:
        of_steps_done["Of the steps that were done"] = (
            f"{round_up(values.epsilon_of_steps_done)} at delta {delta}. This holds only if "
            "nothing that was released decided when the run ended, for example if a time limit did"
        )
    return {
        **of_steps_done,
        "At other deltas": deltas,
        f"If one {values.unit} is replaced": f"{replaced} at delta {delta} (replace_one)",
        f"For several {values.unit}s together": f"{groups}, at delta {delta}",
        "Without random sampling": f"{unamplified} at delta {delta}, if each {values.unit} were "
        "used once per pass over the data, at a step that everybody knows",
    }


def settings_in_words(record: dict[str, Any]) -> str:
    """The class of a sampler, clip rule or mechanism, and its settings."""
    # A switch that is off says nothing to a reader; the JSON has it.
    settings = [
        f"with {name}" if value is True else f"{name} {_short(value)}"
        for name, value in record.items()
        if name != "kind" and value is not False
    ]
    # A class of the user's own is written as "module:Outer.Class".
    name = re.split("[:.]", record["kind"])[-1]
    return f"{name} ({', '.join(settings)})" if settings else name


def _short(value: Any) -> str:
    if isinstance(value, dict) and value["kind"] == "Schedule":
        levels = value["values"]
        return f"{levels[0]:.4g} at first to {levels[-1]:.4g} at last, in {len(levels)} stages"
    if isinstance(value, dict) and value["kind"] == "dict":
        items = [f"{name}: {_short(item)}" for name, item in value["items"][:MAX_ITEMS]]
        more = len(value["items"]) - len(items)
        return ", ".join(items) + (f" and {more} more" if more else "")
    if isinstance(value, dict):
        return settings_in_words(value)
    if isinstance(value, list):
        ending = ", ..." if len(value) > MAX_ITEMS else ""
        return f"[{', '.join(map(_short, value[:MAX_ITEMS]))}{ending}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    # A bool is an int too, but has no thousands.
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else str(value)


def _as_sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def _per_thousand(probability: float) -> str:
    return f"{math.ceil(1000 * probability):,} in 1,000"


def _wrap(text: str, head: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))
