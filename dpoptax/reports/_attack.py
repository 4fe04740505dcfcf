"""What a report says about an attack on the run: how far it got, and what that means."""

import textwrap
from typing import Any, Protocol, runtime_checkable

import attrs

from dpoptax import _serialize
from dpoptax._plan import Plan
from dpoptax.accounting import Ledger
from dpoptax.reports._round import round_down, round_up

WIDTH = 110
NOT_A_PROOF = (
    "This is what one kind of attack reached. A better attack may reach more, up to the guarantee."
)
NOT_PRIVATE = (
    "An audit reads the data and who was in. Its scores, its curve and this bound are not private: "
    "publish them only if the data and the canaries are public or made up."
)


@runtime_checkable
class Attack(Protocol):
    """What a report needs of `dpoptax.audit.Audit`, which documents it."""

    @property
    def epsilon(self) -> float:
        """The epsilon that the attacked steps guarantee."""
        ...

    @property
    def plan(self) -> Plan:
        """The plan of the attacked run."""
        ...

    def roc(self) -> Any:
        """Returns the rates of the attack."""
        ...

    def summary(self, confidence: float = 0.95) -> "AttackSummary":
        """Returns the attack and its bounds."""
        ...


@attrs.frozen(kw_only=True)
class AttackSummary:
    """An attack and its lower bounds on epsilon.

    Attributes:
        attack: what was done.
        num_in: how many canaries were in.
        num_out: how many were out.
        confidence: of each bound.
        guarantee: the epsilon of the attacked steps.
        bounds: the default one first, then those that assume less.
        refusal: why there is no bound; empty if there is one.
    """

    attack: str
    num_in: int
    num_out: int
    confidence: float
    guarantee: float
    bounds: tuple[Any, ...]
    refusal: str = ""

    def record(self) -> dict[str, Any]:
        """Returns the values in terms of JSON."""
        values = attrs.asdict(self, recurse=False)
        bounds = [attrs.asdict(bound) for bound in values.pop("bounds")]
        record = {name: _serialize.encode(value) for name, value in values.items()}
        return record | {
            "bounds": [
                {name: _serialize.encode(value) for name, value in bound.items()}
                for bound in bounds
            ]
        }

    @property
    def exceeds(self) -> bool:
        """Whether the best bound is above the guarantee."""
        return bool(self.bounds) and self.bounds[0].epsilon > self.guarantee


def reached(summary: AttackSummary) -> str:
    """Returns the sentence that compares the attack with the guarantee."""
    if not summary.bounds:
        return f"There is no lower bound on epsilon: {summary.refusal}"
    epsilon, confidence = summary.bounds[0].epsilon, as_percent(summary.confidence)
    if epsilon == 0:
        found = f"Attacks of this kind reached no epsilon above 0 ({confidence} confidence)"
    else:
        found = (
            f"Attacks of this kind reached at least epsilon {round_down(epsilon)} ({confidence} "
            "confidence)"
        )
    return f"{found}; the guarantee is {round_up(summary.guarantee)}."


def if_it_exceeds(summary: AttackSummary) -> str:
    """Returns what a bound above the guarantee means, before or after there is one."""
    chance = as_percent(1 - summary.confidence)
    if not summary.exceeds:
        return f"A correct run has a bound above its epsilon with a probability of up to {chance}."
    return (
        "The bound is above the guarantee. Either something is wrong, or this is chance: up to "
        f"{chance} of correct runs have such a bound. Do not publish the result. Audit again, with "
        "new keys, more canaries and a confidence of 99.9 %. If the bound is again above the "
        "guarantee, the run does not keep it: look for the fault, or for an assumption of the "
        "bound that does not hold."
    )


def rows_of_attack(summary: AttackSummary) -> dict[str, str]:
    """Returns the section of the report."""
    rows = {
        "Attack": f"{summary.attack}: {summary.num_in:,} in, {summary.num_out:,} out",
        "Reached": reached(summary),
    }
    if summary.bounds:
        rows["Assuming"] = " ".join(summary.bounds[0].assumptions) or "nothing else"
    if summary.bounds[1:]:
        rows["With fewer assumptions"] = " ".join(
            f"At least {round_down(bound.epsilon)}, assuming: {' '.join(bound.assumptions)}"
            for bound in summary.bounds[1:]
        )
    rows["Warning" if summary.exceeds else "By chance"] = if_it_exceeds(summary)
    rows["What it shows"] = f"{NOT_A_PROOF} {NOT_PRIVATE}"
    return rows


def as_text(summary: AttackSummary) -> str:
    """Returns an attack as a separate text."""
    rows = rows_of_attack(summary)
    width = max(map(len, rows))
    lines = [
        textwrap.fill(
            text, WIDTH, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4)
        )
        for name, text in rows.items()
    ]
    return "\n".join(["What an attack reached", "", *lines])


def attack_in_words(summary: AttackSummary | None) -> str:
    """Returns sentences for a reader who knows no formula; nothing without an attack."""
    if summary is None or not summary.bounds:
        return ""
    amount = round_down(summary.bounds[0].epsilon)
    found = f"reached at least {amount}" if summary.bounds[0].epsilon > 0 else "found out nothing"
    text = (
        f" We attacked the training ourselves, with {summary.num_in + summary.num_out:,} made-up "
        "entries that were included or left out by coin flips. In terms of epsilon, which measures "
        f"how much is revealed, the attack {found}, and at most {round_up(summary.guarantee)} is "
        "promised."
    )
    if summary.exceeds:
        chance = as_percent(1 - summary.confidence)
        text += (
            " That is more than promised. Either something is wrong, or it is chance, which has a "
            f"probability of up to {chance}. Do not publish the result before it is clear which."
        )
    return text


def summary_and_rates(audit: Attack | None, ledger: Ledger) -> tuple[AttackSummary | None, Any]:
    """Returns what a report keeps of an audit; raises if it is of another run."""
    if audit is None:
        return None, None
    expected = ledger.sampler, ledger.delta
    if (audit.plan.sampler, audit.plan.delta) != expected:
        raise ValueError(
            f"expected an audit of this run, of {ledger.sampler.num_examples:,} units at delta "
            f"{ledger.delta:g}; got one of {audit.plan.sampler.num_examples:,} units at delta "
            f"{audit.plan.delta:g}, or of another sampler. Make the audit with the plan of the run."
        )
    return audit.summary(), audit.roc()


def as_percent(probability: float) -> str:
    """Writes a probability in percent, without the rounding of floating point."""
    return f"{100 * probability:.10g} %"
