"""Steps done in, a bar with the epsilon that they cost out."""

import time
from types import TracebackType

import tqdm

from dpoptax.plan import Plan

# The share of the running time that may go into evaluating epsilon for the bar.
SHARE_OF_TIME = 0.05


class ProgressBar:
    """A tqdm bar that moves only together with its epsilon.

    Step and epsilon are always of one moment: no epsilon is shown that the steps shown beside it
    did not incur.
    """

    def __init__(self, plan: Plan, *, enabled: bool) -> None:
        self._plan = plan
        self._bar = tqdm.tqdm(total=plan.num_steps, unit="step", disable=not enabled)
        self._cost = 0.0
        self._shown_at = -float("inf")

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, done: int) -> None:
        """Shows `done` steps and their epsilon, if due: at the end, or when it costs little."""
        now = time.monotonic()
        due = now - self._shown_at > self._cost / SHARE_OF_TIME
        if self._bar.disable or not (due or done == self._plan.num_steps):
            return
        epsilon = self._plan.epsilon(done)
        self._shown_at = time.monotonic()
        self._cost = self._shown_at - now
        self._bar.set_postfix_str(f"ε = {epsilon:.3f} at δ = {self._plan.delta:g}", refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()
