"""The result of training: parameters, ledger and report."""

import dataclasses
from typing import Literal, TypeAlias

from dpoptax._attacks import Audit
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.accounting import Ledger, RandomRuns
from dpoptax.reports import Report
from dpoptax.training._audited import Started, finish_audit
from dpoptax.training._charges import ledger_of_all_steps, ledger_of_run
from dpoptax.training._resume.run import NoResume, ResumableRun
from dpoptax.training._train_step import TrainState
from dpoptax.transforms._average import average_like

StopReason: TypeAlias = Literal[
    "plan", "SIGINT", "SIGTERM", "time limit", "callback", "another process"
]
# A clock or a scheduler decided. Behind each other reason there may be somebody, or a function,
# who looked at the parameters.
STOPS_WITHOUT_LOOKING: tuple[StopReason, ...] = ("plan", "SIGTERM", "time limit")


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` returns.

    Attributes:
        params: the private parameters.
        state: all that a further step needs. It contains keys: do not publish it. The printed
            result leaves it out.
        plan: the plan of the run.
        num_steps: how many steps made these parameters.
        ledger: every step that was charged, each before it ran. It includes steps that a crash
            lost and that a changed program could not repeat.
        prng: where the random numbers came from, in words.
        stopped: why training ended. "plan": all steps are done. "SIGINT" (Ctrl-C), "SIGTERM": a
            signal. "time limit": see `time_limit`. "callback": a function in `progress` asked for
            it. "another process": a process that trains together with this one had to stop. After
            "callback", "SIGINT" and "another process" the guarantee is that of all planned steps.
        nonprivate_nonfinite_count: how often an example was drawn in this call whose loss was not
            finite (with `diagnostics`: loss or gradient). A gradient that is not finite contributes
            nothing. None if this call made no step. Not private, and no part of the report.
        audit: what the canaries of `fit(audit=...)` showed; None without canaries. Not private.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(100, 10), clip=1.0, noise_multiplier=2.0,
        ...     num_steps=2, delta=1e-3)
        >>> result = dpoptax.training.fit(
        ...     lambda w, x: jnp.sum((w - x) ** 2), jnp.zeros(2), jnp.ones((100, 2)), plan=plan,
        ...     optimizer=optax.sgd(0.1), key=jax.random.key(0), progress=False)
        >>> result.num_steps, result.stopped, result.epsilon() == plan.epsilon()
        (2, 'plan', True)
    """

    params: PyTree
    state: TrainState = dataclasses.field(repr=False)
    plan: Plan
    num_steps: int
    ledger: Ledger
    prng: str
    stopped: StopReason
    nonprivate_nonfinite_count: int | None = dataclasses.field(default=None, repr=False)
    audit: Audit | None = dataclasses.field(default=None, repr=False)

    @property
    def averaged_params(self) -> PyTree:
        """The average that `dpoptax.transforms.average_params` kept; None if it was not used.

        It is as private as `params`, and has its dtypes.
        """
        return average_like(self.params, self.state.opt_state)

    @property
    def guaranteed_ledger(self) -> Ledger:
        """The ledger of the guarantee: that of all steps if the parameters may have ended the run.

        Charge it to the next run on the same data by `charge_event(guaranteed_ledger.event())`.
        """
        return self._ledger_of_all_steps() or self.ledger

    def epsilon(self, delta: float | None = None) -> float:
        """Returns the epsilon that the run guarantees, under the relation of the sampler.

        If a function in `progress` or Ctrl-C ended the run, this is the epsilon of all planned
        steps, because the parameters may have decided it. `ledger.epsilon()` is that of the steps
        that ran. It holds if nothing that was released decided when the run ended.
        """
        return self.guaranteed_ledger.epsilon(delta)

    def report(self, runs: RandomRuns | None = None) -> Report:
        """Returns the privacy statement of the run, with both epsilons if it ended early.

        Args:
            runs: the distribution of the number of runs, if this is the best run of a search. The
                statement then is that of a search in which no run cost more than this one. With
                candidates that cost more, see `accounting.tuned`.
        """
        return Report.from_ledger(
            self.ledger,
            all_steps=self._ledger_of_all_steps(),
            steps_done=self.num_steps,
            steps_planned=self.plan.num_steps,
            noise_multiplier=self.plan.noise_multiplier,
            mechanism=self.plan.mechanism,
            prng=self.prng,
            runs=runs,
            audit=self.audit,
        )

    def _ledger_of_all_steps(self) -> Ledger | None:
        """The ledger of the guarantee, if it is not `ledger`."""
        if self.stopped in STOPS_WITHOUT_LOOKING:
            return None
        return ledger_of_all_steps(self.ledger, self.plan, self.num_steps)


def make_result(
    state: TrainState,
    plan: Plan,
    run: ResumableRun | NoResume,
    stopped: StopReason,
    nonfinite: tuple[int, int] | None = None,
    started: Started | None = None,
) -> FitResult:
    """Returns the result of a run that ended in `state`."""
    done = int(state.step)
    audit = None
    if started is not None:
        # What was charged: all planned steps if the parameters may have ended the run.
        charged = done if stopped in STOPS_WITHOUT_LOOKING else plan.num_steps
        audit = finish_audit(started, plan, state.opt_state, state.params, charged)
    return FitResult(
        params=state.params,
        state=state,
        plan=plan,
        num_steps=done,
        # Counted from the log, which also knows the steps that earlier processes lost.
        ledger=ledger_of_run(plan, done, run.lost_steps(done)),
        prng=run.prng,
        stopped=stopped,
        nonprivate_nonfinite_count=None if nonfinite is None else nonfinite[0],
        audit=audit,
    )
