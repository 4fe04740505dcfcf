"""What a privacy report says about correlated noise."""

from typing import Any

from dpoptax import _serialize
from dpoptax.accounting import Ledger
from dpoptax.accounting._correlated import describe_participation, strategy_of
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.reports._values import ReportValues

TOGETHER = (
    "The noise of all steps belongs together. No step was computed a second time with other noise, "
    "and no step was added to those that the noise was made for."
)


def check_same_noise(ledger: Ledger, mechanism: AnyMechanism) -> None:
    """Raises if the noise is correlated in another way than the ledger counted."""
    counted, drawn = strategy_of(ledger.mechanism), strategy_of(mechanism)
    if counted != drawn:
        raise ValueError(
            f"the ledger counted {_named(counted)}, but the mechanism draws {_named(drawn)}. Make "
            "the ledger with plan.ledger(), or pass the same mechanism to both."
        )


def correlation(ledger: Ledger, steps_planned: int) -> dict[str, Any] | None:
    """Returns the strategy, its number of steps, and in which of them a unit may take part."""
    strategy = strategy_of(ledger.mechanism)
    if strategy is None:
        return None
    return {
        "strategy": type(strategy).__name__,
        "num_bands": strategy.num_bands,
        "num_steps": strategy.num_steps,
        "participation": describe_participation(strategy, ledger.sampler, steps_planned),
    }


def assumptions_of(ledger: Ledger) -> tuple[str, ...]:
    """Returns the conditions of a statement about correlated noise."""
    return () if strategy_of(ledger.mechanism) is None else (TOGETHER,)


def rows_of(values: ReportValues) -> dict[str, str]:
    """Returns the rows of the report."""
    found = values.correlation
    if found is None:
        return {}
    bands = found["num_bands"]
    earlier = "earlier steps"
    if bands < found["num_steps"]:
        earlier = f"the {bands - 1:,} steps before" if bands > 2 else "the step before"
    before = "No step uses the noise of another one"
    if bands > 1:
        before = (
            f"The noise of a step takes back a part of the noise of {earlier}, so that less of "
        )
        before += "it stays in the result"
    return {
        "Correlated noise": f"{before}. How much it takes back was fixed before the run, by the "
        f"strategy {found['strategy']} for at most {found['num_steps']:,} steps. The guarantee "
        "includes this",
        "Participation": found["participation"],
    }


def _named(strategy: Any) -> str:
    if strategy is None:
        return "independent noise"
    return f"the noise of {_serialize.summary(_serialize.encode_or_describe(strategy))}"
