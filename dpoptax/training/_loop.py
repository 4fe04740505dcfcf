"""The training loop of `fit`: charges, authorizes, runs and saves steps until the run ends."""

import time
from collections.abc import Sequence

from dpoptax._plan import Plan
from dpoptax.training._charges import charge_and_authorize, ledger_of_run
from dpoptax.training._dispatch import DispatchSize, Stepper
from dpoptax.training._multihost import any_process
from dpoptax.training._progress import Listener, ProgressReporter
from dpoptax.training._result import StopReason
from dpoptax.training._resume.run import NoResume, ResumableRun
from dpoptax.training._stopping import Interrupts
from dpoptax.training._train_step import TrainState


def run_steps(
    state: TrainState,
    stepper: Stepper,
    run: ResumableRun | NoResume,
    plan: Plan,
    progress: bool | Listener | Sequence[bool | Listener],
) -> tuple[TrainState, StopReason]:
    """Runs the remaining steps of a plan; returns the last state, saved, and why it stopped."""
    done = int(state.step)
    # A crash may have lost steps that this run now replays bit for bit. They were charged before
    # the crash, so they count from the start and are not charged again.
    charged = max(done, run.authorized)
    ledger = ledger_of_run(plan, charged, run.lost_steps())
    size = DispatchSize()
    asked = False
    with (
        ProgressReporter(progress, ledger, done=done, num_steps=plan.num_steps) as reporter,
        Interrupts() as interrupts,
    ):
        while done < plan.num_steps and not any_process(asked or interrupts.reason is not None):
            limit = int(min(plan.num_steps - done, reporter.steps_to_next_call(done)))
            end = done + size.next(limit, stepper.steps_per_dispatch)
            # Charge in memory and on disk first: a step that runs is never missing in the count.
            charged = charge_and_authorize(ledger, plan, run, charged, end)
            started = time.monotonic()
            state, info = stepper.advance(state, end - done)
            size.adapt(time.monotonic() - started, interrupts.seconds_left)
            done = end
            run.save_if_due(state)
            last = done == plan.num_steps or interrupts.reason is not None
            asked = reporter.update(state, info, last=last)
        # Still inside: a signal during the last save must not end the process.
        run.save(state)
        if done == plan.num_steps:
            return state, "plan"
        # A function that asked first: a signal or a time limit may have come while it ran.
        return state, "callback" if asked else interrupts.reason or "another process"
