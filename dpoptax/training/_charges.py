"""Privacy charges of a run: which steps of the plan the ledger counts."""

import copy
from collections.abc import Iterable

from dpoptax._plan import Plan
from dpoptax.accounting import Ledger
from dpoptax.mechanisms import StatefulMechanism
from dpoptax.schedules import as_schedule
from dpoptax.training._resume.run import NoResume, ResumableRun


def charge_steps(ledger: Ledger, plan: Plan, first: int, end: int) -> None:
    """Charges the steps from `first` up to `end`, with the noise that the plan has for them."""
    if first < end:
        ledger.charge(as_schedule(plan.noise_multiplier).slice(first, end), end - first)


def charge_and_authorize(
    ledger: Ledger, plan: Plan, run: ResumableRun | NoResume, charged: int, end: int
) -> int:
    """Charges the steps up to `end`, in memory and on disk; returns how many are charged.

    Call it before these steps run: a step that runs is then never missing in the count.
    """
    charge_steps(ledger, plan, charged, end)
    run.authorize(end)
    return max(charged, end)


def ledger_of_run(plan: Plan, num_steps: int, lost_steps: Iterable[tuple[int, int]]) -> Ledger:
    """Returns a ledger with the first `num_steps` steps, and the ranges lost in crashes.

    With correlated noise, a lost range counts as a further run of all steps up to its end. Its
    steps depend on the same earlier noise as the steps of this run that took their place. To
    release the rows of `x + C^-1 Z` is to release those of `C x + Z`, so the lost steps are rows
    of `C x + Z` whose `Z` is used nowhere else. They are a part of a further run.
    """
    ledger = plan.ledger()
    if isinstance(plan.mechanism, StatefulMechanism):
        for _, end in lost_steps:
            charge_steps(ledger, plan, 0, end)
            ledger.restart()
        # The last, so that further steps are charged to it.
        lost_steps = ()
    for first, end in ((0, num_steps), *lost_steps):
        charge_steps(ledger, plan, first, end)
    return ledger


def ledger_of_all_steps(ledger: Ledger, plan: Plan, charged: int) -> Ledger:
    """Returns a copy of a ledger that has `charged` steps of a plan, with the other steps added.

    If the released parameters decided when a run ended, the run has the guarantee of all steps.
    """
    whole = copy.copy(ledger)
    charge_steps(whole, plan, charged, plan.num_steps)
    return whole
