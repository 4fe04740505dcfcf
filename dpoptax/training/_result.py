"""What training leaves behind."""

import dataclasses

from jaxtyping import PyTree

from dpoptax._plan import Plan
from dpoptax.accounting import Ledger
from dpoptax.reports import Report
from dpoptax.training._train_step import TrainState


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What training leaves behind.

    Attributes:
        params: the private parameters.
        state: everything that a further step would need; holds keys, so it must not be released,
            and is not shown where the result is printed.
        plan: what was planned.
        num_steps: how many steps made these parameters.
        ledger: what was charged, each step before it ran; those that a crash lost, and a changed
            program could not repeat, among them.
        generator: where the random numbers came from.
        stopped: why training ended: "plan", the name of a signal, "time limit", "another process".
    """

    params: PyTree
    state: TrainState = dataclasses.field(repr=False)
    plan: Plan
    num_steps: int
    ledger: Ledger
    generator: str
    stopped: str

    def epsilon(self, delta: float | None = None) -> float:
        """Returns what everything that ran cost, under the relation of the sampler."""
        return self.ledger.epsilon(delta)

    def report(self) -> Report:
        """Returns the privacy statement of the steps that ran."""
        return Report.from_ledger(
            self.ledger,
            steps_done=self.num_steps,
            steps_planned=self.plan.num_steps,
            noise_multiplier=self.plan.noise_multiplier,
            mechanism=self.plan.mechanism,
            prng=self.generator,
        )
