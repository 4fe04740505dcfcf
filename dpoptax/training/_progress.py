"""Steps done in, a bar or a call with the epsilon that they cost out."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import tqdm

from dpoptax.accounting import Ledger
from dpoptax.reports import round_up
from dpoptax.training._train_step import StepInfo

# The share of the running time that may go into evaluating epsilon.
SHARE_OF_TIME = 0.005


class Progress(NamedTuple):
    """Where a run is. All of one moment: the steps shown incurred the epsilon beside them.

    Attributes:
        step: steps done.
        num_steps: steps planned.
        epsilon: what these steps cost, and those that a crash lost.
        delta: at which.
        seconds_left: an estimate.
        nonprivate: readings of the last step made; None unless asked for. They are computed from
            the data without noise: what they tell is outside the guarantee.
    """

    step: int
    num_steps: int
    epsilon: float
    delta: float
    seconds_left: float
    nonprivate: StepInfo | None = None


Show = Callable[[Progress], None]


class Reporter:
    """Shows progress when it is due: at the end, or when evaluating epsilon costs little.

    A bar counts steps meanwhile, and names the step whose epsilon it shows.
    """

    def __init__(self, show: bool | Show, ledger: Ledger, *, done: int, num_steps: int) -> None:
        """Begins.

        Args:
            show: True for a bar, False for nothing, or what is to be called.
            ledger: of the run; charged before `update`.
            done: steps that were done before.
            num_steps: steps planned.
        """
        self._bar = tqdm.tqdm(total=num_steps, initial=done, unit="step", disable=show is not True)
        self._show = self._on_bar if show is True else show
        self._ledger = ledger
        self._started, self._first, self._num_steps = time.monotonic(), done, num_steps
        self._cost = 0.0
        self._shown_at = -float("inf")

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, done: int, info: StepInfo | None = None, *, last: bool = False) -> None:
        """Shows that `done` steps are done, if due.

        Args:
            done: steps, all of them charged to the ledger.
            info: readings of the last of them, if asked for.
            last: no other will follow.
        """
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if not callable(self._show) or not (
            last or now - self._shown_at > self._cost / SHARE_OF_TIME
        ):
            return
        epsilon = self._ledger.epsilon()
        self._shown_at = time.monotonic()
        self._cost = self._shown_at - now
        pace = (now - self._started) / max(done - self._first, 1)
        left = pace * (self._num_steps - done)
        self._show(Progress(done, self._num_steps, epsilon, self._ledger.delta, left, info))

    def _on_bar(self, progress: Progress) -> None:
        epsilon = round_up(progress.epsilon)
        text = f"ε = {epsilon} at δ = {progress.delta:g} after {progress.step:,} steps"
        if progress.nonprivate is not None:
            text += f"; {_in_words(progress.nonprivate)}"
        self._bar.set_postfix_str(text)


def _in_words(info: StepInfo) -> str:
    return (
        f"not private: loss {float(info.nonprivate_loss):.4g}, "
        f"{float(info.nonprivate_clip_fraction):.0%} clipped, "
        f"median norm {float(info.nonprivate_median_norm):.3g}"
    )
