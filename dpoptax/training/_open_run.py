"""State, charges and folder of a run that makes one step at a time."""

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.accounting import Ledger, RandomRuns
from dpoptax.reports import Report
from dpoptax.training._charges import charge_and_authorize, ledger_of_all_steps, ledger_of_run
from dpoptax.training._dispatch import Stepper
from dpoptax.training._resume.run import NoResume, ResumableRun
from dpoptax.training._train_step import TrainState
from dpoptax.transforms._average import average_like

# beartype knows no `Self` in a method that it decorates apart from its class.
Run = TypeVar("Run", bound="OpenRun")


class OpenRun:
    """A run between two steps: what was charged, what is done, and where it is saved."""

    def __init__(
        self,
        plan: Plan,
        run: ResumableRun | NoResume,
        stepper: Stepper,
        state: TrainState,
        fingerprint: Callable[[TrainState], str],
    ) -> None:
        """Restores the last state of `run`, and charges what it authorized."""
        self._plan, self._run, self._stepper = plan, run, stepper
        self._begun = self._closed = False
        try:
            state = run.restore(state, plan)
            # A finished run is only read.
            if int(state.step) < plan.num_steps:
                state = run.begin(state, fingerprint, plan)
                self._begun = True
        except BaseException:
            run.close()
            raise
        self._state, self._done = state, int(state.step)
        # Steps that a crash lost and that are replayed now were charged before the crash.
        self._charged = max(self._done, run.authorized)
        self._ledger = ledger_of_run(plan, self._charged, run.lost_steps())

    @property
    def params(self) -> PyTree:
        """The private parameters after the steps that ran."""
        return self.state.params

    @property
    def averaged_params(self) -> PyTree:
        """The average that `dpoptax.transforms.average_params` keeps; None if it is not used."""
        return average_like(self.state.params, self.state.opt_state)

    @property
    def state(self) -> TrainState:
        """All that a further step needs. It contains keys: do not publish it."""
        return self._state

    @property
    def ledger(self) -> Ledger:
        """Every step that was charged, each before it ran."""
        return self._ledger

    @property
    def steps_done(self) -> int:
        """How many steps made `params`."""
        return self._done

    @property
    def steps_left(self) -> int:
        """How many steps of the plan have not run yet."""
        return self._plan.num_steps - self._done

    def epsilon(self, delta: float | None = None) -> float:
        """Returns the epsilon of everything that ran so far, under the relation of the sampler."""
        return self._ledger.epsilon(delta)

    def report(self, runs: RandomRuns | None = None) -> Report:
        """Returns the privacy statement of the run.

        Your loop may end the run because of its parameters. So before the last step, the guarantee
        is that of all planned steps. The report also states the epsilon of the steps that ran.

        Args:
            runs: the distribution of the number of runs, if this is the best run of a search.
        """
        all_steps = None
        if self.steps_left:
            all_steps = ledger_of_all_steps(self._ledger, self._plan, self._charged)
        return Report.from_ledger(
            self._ledger,
            all_steps=all_steps,
            steps_done=self._done,
            steps_planned=self._plan.num_steps,
            noise_multiplier=self._plan.noise_multiplier,
            mechanism=self._plan.mechanism,
            prng=self._run.prng,
            runs=runs,
        )

    def save(self) -> None:
        """Saves the run now. It is also saved from time to time, at the last step and by `close`.

        Raises:
            ValueError: the run has no folder, or it is closed.
        """
        if isinstance(self._run, NoResume):
            raise ValueError(
                "expected a run with a folder; got one without. Make it with "
                "PrivateRun(..., resume=folder): each step is then recorded before it runs."
            )
        self._refuse_if_closed()
        if self._begun:
            self._run.save(self._state)

    def close(self) -> None:
        """Saves the run if it has a folder, and frees the folder. No further step can be made."""
        if not self._closed:
            if self._begun:
                self._run.save(self._state)
            self._closed = True
            self._stepper.close()
            self._run.close()

    def __enter__(self: Run) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        """Leaves out the parameters and the keys."""
        return f"{type(self).__name__}({self._done} steps done of {self._plan.num_steps} planned)"

    def _charge(self, num_steps: int) -> int:
        """Charges the next steps, in memory and on disk; returns the number of the last one."""
        self._refuse_more_than_planned(num_steps)
        end = self._done + num_steps
        self._charged = charge_and_authorize(
            self._ledger, self._plan, self._run, self._charged, end
        )
        return end

    def _finish(self, state: TrainState) -> None:
        self._state, self._done = state, int(state.step)
        self._run.save_if_due(state)
        if not self.steps_left:
            self._run.save(state)

    def _refuse_more_than_planned(self, num_steps: int) -> None:
        self._refuse_if_closed()
        if num_steps > self.steps_left:
            raise ValueError(
                f"expected at most {self.steps_left} more steps, since the plan has "
                f"{self._plan.num_steps} and {self._done} ran; got a call for {num_steps}. The "
                "epsilon of the plan would not cover them. Plan more steps, or continue a saved "
                "run with plan.replace(num_steps=...)."
            )

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ValueError(
                "expected an open run; got one that was closed. Make it again with the same "
                "arguments: a run with resume=folder continues where it was saved."
            )
