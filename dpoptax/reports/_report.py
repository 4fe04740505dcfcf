"""A plan and the steps that ran in, the statement that a person can read, keep and act on out."""

import collections
import dataclasses
import decimal
import importlib.metadata
import json
import math
import pathlib
import textwrap
from typing import TYPE_CHECKING, Any

import dp_accounting

from dpoptax import _serialize
from dpoptax.accounting import trade_off
from dpoptax.accounting._epsilon import PrivacyLoss, event_epsilon, event_privacy_loss
from dpoptax.relations import parse_relation
from dpoptax.schedules import Scheduled, extremes, passes

if TYPE_CHECKING:
    from dpoptax._plan import Plan
    from dpoptax.accounting._ledger import Ledger

GROUPS = (2, 10)
# Their laws are slow to put on a grid; a coarser one overstates them by a percent or so.
GROUP_COARSENING = 8.0
FALSE_POSITIVE_RATES = (1e-3, 1e-2)
PRIORS = (0.5, 0.1, 0.01)
RELEASED = "every noisy gradient, hence every iterate and the final parameters"
NO_GENERATOR = "none yet: a plan draws nothing"
ASSUMPTIONS = (
    "keys are secret, and none serves two runs",
    "runs made to choose model, clip, rate or steps are not counted",
    "when the run ended was not decided by what it had released",
    "losses, norms, batch sizes and the time a step takes are readings of the data, not private",
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was promised to whom, and what it rests on.

    Print it; or `to_json()`, or `save_picture(path)`.

    Attributes:
        unit: what a neighbouring data set has one more or less of.
        relation: which data sets count as neighbours.
        num_units: how many there are.
        released: what left the program.
        sampler: its kind and parameters.
        clip: its kind and bound.
        noise_multiplier: a number or a schedule.
        steps_planned: of the plan.
        steps_done: of them.
        steps_lost: that were charged beside them: done, lost in a crash, and not repeated alike.
        delta: of the guarantee.
        epsilon: of the guarantee; inf for a run without noise.
        epsilon_at: at other deltas.
        epsilon_replaced: under replace_one, at delta; inf where none is known.
        epsilon_of_group: for so many units that stand or fall together, at delta.
        epsilon_unamplified: if everyone took part once per pass, at a step known to all.
        advantage: of an optimal attacker, true minus false positive rate.
        true_positive_rate: of an optimal attacker, by false positive rate.
        belief: that an optimal attacker can reach, by belief before; but for a probability delta.
        mu: of the least private Gaussian that is no more private than the run.
        accountant: which, and its version.
        generator: where the random numbers came from.
        assumptions: what the statement rests on.
        loss: for the picture.
    """

    unit: str
    relation: str
    num_units: int
    released: str
    sampler: dict[str, Any]
    clip: dict[str, Any]
    noise_multiplier: Scheduled
    steps_planned: int
    steps_done: int
    steps_lost: int
    delta: float
    epsilon: float
    epsilon_at: dict[float, float]
    epsilon_replaced: float
    epsilon_of_group: dict[int, float]
    epsilon_unamplified: float
    advantage: float
    true_positive_rate: dict[float, float]
    belief: dict[float, float]
    mu: float
    accountant: str
    generator: str
    assumptions: tuple[str, ...]
    loss: PrivacyLoss = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        width = max(map(len, self._rows()))
        lines = ["Differential privacy", ""]
        lines += [f"  {name:<{width}}  {text}" for name, text in self._rows().items()]
        lines += ["", "What this rests on", *(f"  - {text}" for text in self.assumptions)]
        return "\n".join([*lines, "", "In words", *_wrapped(self.in_words())])

    def in_words(self) -> str:
        """Returns one paragraph for a reader who knows no formula."""
        unit = self.unit
        if math.isinf(self.epsilon) and extremes(self.noise_multiplier)[0] > 0:
            return (
                "For this run no finite epsilon can be shown at this delta, so nothing can be "
                "promised: ask at a larger delta, or add more noise."
            )
        if math.isinf(self.epsilon):
            return (
                "This run added no noise at some step, and so protects nobody: treat what it "
                "released as you would treat the data itself."
            )
        rate, found = next(iter(self.true_positive_rate.items()))
        prior, belief = next(iter(self.belief.items()))
        chance = math.floor(1 / self.delta + 1e-6)
        right = round_up(50 + 50 * self.advantage, 1)
        return (
            f"The training used {self.num_units:,} {unit}s and released its result with random "
            f"noise, such that the result would have been nearly as likely had any one {unit} been "
            f"left out. Somebody who knows all other {unit}s, sees everything released, and wants "
            f"to tell whether one given {unit} was included, is right at most "
            f"{right} times in 100 where guessing is right 50 times. If such an attacker may be "
            f"wrong about one outsider in {round(1 / rate):,}, they find at most {_share(found)} "
            f"of those included. A belief of {100 * prior:.0f} % that the {unit} was included can "
            f"rise to {round_up(100 * belief, 1)} % at most, but for a chance of one in "
            f"{chance:,}. This holds whatever the attacker knows or computes later; it says "
            f"nothing of what can be concluded about one {unit} from the others."
        )

    def to_json(self) -> str:
        """Returns every number as JSON; infinity is the string "inf"."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "loss"
        }
        fields["noise_multiplier"] = _serialize.number_record(self.noise_multiplier)
        return json.dumps(
            {"format": "dpoptax report 1", **_finite(fields), "in_words": self.in_words()}, indent=2
        )

    def save_picture(self, path: str | pathlib.Path) -> None:
        """Draws what an attacker can do, and writes it to `path`; needs matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from dpoptax.reports import _figure as picture

        picture.save(self, pathlib.Path(path))

    def _rows(self) -> dict[str, str]:
        if math.isinf(self.epsilon):
            guarantee = "none: epsilon = inf"
        else:
            guarantee = f"({round_up(self.epsilon)}, {_delta(self.delta)})-differential privacy"
        groups = ", ".join(
            f"{round_up(value)} for {size}" for size, value in self.epsilon_of_group.items()
        )
        deltas = ", ".join(
            f"{round_up(value)} at delta {_delta(delta)}"
            for delta, value in self.epsilon_at.items()
        )
        rates = ", ".join(
            f"{round_up(100 * found, 2)} % of members at {100 * rate:g} % false alarms"
            for rate, found in self.true_positive_rate.items()
        )
        beliefs = ", ".join(
            f"{100 * prior:g} % to {round_up(100 * belief, 1)} %"
            for prior, belief in self.belief.items()
        )
        sampler = dict(self.sampler)
        kind = sampler.pop("kind")
        lost = f", and {self.steps_lost} lost in a crash" if self.steps_lost else ""
        return {
            "guarantee": guarantee,
            "unit, relation": f"one {self.unit} of {self.num_units}, {self.relation}",
            "released": self.released,
            "sampler": f"{kind}, " + ", ".join(f"{k} {_short(v)}" for k, v in sampler.items()),
            "clip": ", ".join(f"{k} {_short(v)}" for k, v in self.clip.items() if k != "kind"),
            "noise_multiplier": _short(_serialize.number_record(self.noise_multiplier)),
            "steps": f"{self.steps_done} done of {self.steps_planned} planned{lost}",
            "accountant": self.accountant,
            "generator": self.generator,
            "epsilon": deltas,
            "under replace_one": f"{round_up(self.epsilon_replaced)} at delta {_delta(self.delta)}",
            f"for groups of {self.unit}s": groups,
            "without amplification": f"{round_up(self.epsilon_unamplified)}, "
            "if all took part once per pass, at a known step",
            "attack advantage": f"{round_up(100 * self.advantage, 2)} points of true over false "
            "positives",
            "attack finds at most": rates,
            "belief can rise from": beliefs,
            "no worse than": f"a Gaussian release of mu = {round_up(self.mu)} (mu-GDP)",
        }


def of_plan(plan: "Plan", num_steps: int) -> Report:
    """Returns the report of the first steps of a plan.

    Args:
        plan: what ran.
        num_steps: how many of its steps ran.

    Returns:
        A `Report`.
    """
    ledger = plan.ledger()
    ledger.charge(plan.scheduled_noise, num_steps)
    return of_run(plan, ledger, num_steps)


def of_run(plan: "Plan", ledger: "Ledger", num_steps: int) -> Report:
    """Returns the report of a run.

    Args:
        plan: what was planned.
        ledger: what was charged.
        num_steps: how many steps of the plan ran, of those charged.

    Returns:
        A `Report`.
    """
    sampler, delta = plan.sampler, plan.delta
    relation = parse_relation(sampler.relation)
    event = ledger.event(relation)
    loss = event_privacy_loss(event, delta=delta / 10, relation=relation)
    # Written without what dividing leaves at the end, which would be rounded up where it is shown.
    below, above = (float(f"{value:.12g}") for value in (delta / 10, delta * 10))
    deltas = [value for value in (above, delta, below) if value < 1]
    epsilon_at = {value: ledger.epsilon(value) for value in deltas}
    rates = trade_off.true_positive_rates(loss, list(FALSE_POSITIVE_RATES))
    return Report(
        unit=sampler.unit,
        relation=relation.name.lower(),
        num_units=sampler.num_examples,
        released=RELEASED,
        sampler=_serialize.sampler_identity(sampler),
        clip=_serialize.clip_identity(plan.clip_rule),
        noise_multiplier=plan.scheduled_noise,
        steps_planned=plan.num_steps,
        steps_done=num_steps,
        steps_lost=ledger.num_steps - num_steps,
        delta=delta,
        epsilon=epsilon_at[delta],
        epsilon_at=epsilon_at,
        epsilon_replaced=_replaced(ledger),
        epsilon_of_group={
            size: event_epsilon(
                event, delta=delta, relation=relation, group_size=size, coarsening=GROUP_COARSENING
            )
            for size in GROUPS
        },
        epsilon_unamplified=_unamplified(plan, ledger),
        advantage=trade_off.advantage(loss),
        true_positive_rate=dict(zip(FALSE_POSITIVE_RATES, rates.tolist(), strict=True)),
        belief={prior: trade_off.posterior_belief(epsilon_at[delta], prior) for prior in PRIORS},
        mu=trade_off.dominating_mu(loss),
        accountant=f"privacy loss distribution, dpoptax {importlib.metadata.version('dpoptax')} on "
        f"dp-accounting {importlib.metadata.version('dp-accounting')}",
        generator=NO_GENERATOR,
        assumptions=(*ASSUMPTIONS, plan.mechanism.caveat),
        loss=loss,
    )


def _replaced(ledger: "Ledger") -> float:
    """Epsilon under replace_one; inf where nothing is known of what was charged beside the run."""
    try:
        return ledger.epsilon(relation="replace_one")
    except dp_accounting.UnsupportedEventError:
        return math.inf


def _unamplified(plan: "Plan", ledger: "Ledger") -> float:
    """Epsilon if everyone took part once per pass over the data, at a step known to all."""
    if ledger.num_steps == 0:
        return 0.0
    _, size = extremes(plan.sampler.expected_batch_size)
    steps_per_pass = max(math.floor(plan.sampler.num_examples / size), 1)
    counts: collections.Counter[float] = collections.Counter()
    for noise, num_steps in ledger.runs:
        counts.update(passes(noise, num_steps, steps_per_pass))
    if min(counts) == 0:
        return math.inf
    precision = sum(count / noise**2 for noise, count in counts.items())
    gaussian = dp_accounting.GaussianDpEvent(precision**-0.5)
    return event_epsilon(gaussian, delta=plan.delta)


def round_up(value: float, digits: int = 3) -> str:
    """Writes a number with some digits behind the point, never below it.

    Args:
        value: an epsilon, say.
        digits: how many.

    Returns:
        Digits, or "inf".

    Example:
        >>> round_up(0.5351)
        '0.536'
    """
    if not math.isfinite(value):
        return "inf"
    written = decimal.Decimal(repr(float(value)))
    return str(written.quantize(decimal.Decimal(1).scaleb(-digits), decimal.ROUND_CEILING))


def _delta(value: float) -> str:
    """With three digits, never below it."""
    context = decimal.Context(prec=3, rounding=decimal.ROUND_CEILING)
    return f"{float(context.create_decimal(repr(value))):.3g}"


def _short(value: Any) -> str:
    if isinstance(value, dict) and "values" in value:
        values = value["values"]
        return f"{values[0]:.4g} to {values[-1]:.4g} in {len(values)} runs of steps"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _share(probability: float) -> str:
    return f"{math.ceil(1000 * probability):,} in 1,000"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 92, initial_indent="  ", subsequent_indent="  ")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
