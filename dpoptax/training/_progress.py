"""Progress of a run: a bar, or calls of a function, with the epsilon spent so far."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from dpoptax.accounting import Ledger
from dpoptax.reports import round_up
from dpoptax.training._train_step import StepInfo

# The fraction of the running time that may be spent on computing epsilon. A larger one refreshes
# the bar more often and slows the run down.
EPSILON_TIME_FRACTION = 0.005


class Progress(NamedTuple):
    """The progress of a run at one moment: `epsilon` is what exactly `step` steps cost.

    Attributes:
        step: steps done.
        num_steps: steps planned.
        epsilon: the cost of the steps done, and of steps that a crash lost.
        delta: the delta of this epsilon.
        seconds_left: an estimate.
        nonprivate: diagnostics of the last step; None unless `fit(diagnostics=True)`. They are not
            private: they come from the data without noise.
    """

    step: int
    num_steps: int
    epsilon: float
    delta: float
    seconds_left: float
    nonprivate: StepInfo | None = None


Show = Callable[[Progress], None]


class ProgressReporter:
    """Shows progress at the end of a run, and whenever computing epsilon costs little.

    In between, a bar only counts steps. It names the step that its epsilon belongs to.
    """

    def __init__(self, show: bool | Show, ledger: Ledger, *, done: int, num_steps: int) -> None:
        self._bar = _Bar(done, num_steps) if show is True else None
        self._show = self._bar.show if self._bar is not None else show
        self._ledger = ledger
        self._started, self._first, self._num_steps = time.monotonic(), done, num_steps
        self._cost = 0.0
        self._shown_at = -float("inf")

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, info: StepInfo | None = None, *, last: bool = False) -> None:
        """Shows that `done` steps, all charged to the ledger, are done; always if `last`."""
        if self._bar is not None:
            self._bar.move_to(done)
        if not callable(self._show):
            return
        now = time.monotonic()
        # Epsilon may take a second to compute: wait until its cost is small compared with the run.
        if not last and now - self._shown_at <= self._cost / EPSILON_TIME_FRACTION:
            return
        epsilon = self._ledger.epsilon()
        self._shown_at = time.monotonic()
        self._cost = self._shown_at - now
        pace = (now - self._started) / max(done - self._first, 1)
        seconds_left = pace * (self._num_steps - done)
        self._show(Progress(done, self._num_steps, epsilon, self._ledger.delta, seconds_left, info))


class _Bar:
    """A tqdm bar."""

    def __init__(self, done: int, num_steps: int) -> None:
        import tqdm  # only a run with a bar needs it

        self._bar = tqdm.tqdm(total=num_steps, initial=done, unit="step")

    def move_to(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def show(self, progress: Progress) -> None:
        epsilon = round_up(progress.epsilon)
        text = f"ε = {epsilon} at δ = {progress.delta:g} after {progress.step:,} steps"
        if progress.nonprivate is not None:
            text += f"; {_describe(progress.nonprivate)}"
        self._bar.set_postfix_str(text)

    def close(self) -> None:
        self._bar.close()


def _describe(info: StepInfo) -> str:
    return (
        f"not private: loss {float(info.nonprivate_loss):.4g}, "
        f"{float(info.nonprivate_clip_fraction):.0%} clipped, "
        f"median norm {float(info.nonprivate_median_norm):.3g}"
    )
