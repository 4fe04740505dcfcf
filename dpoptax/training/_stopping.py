"""Signals and a time limit in, "stop when this dispatch is done" out."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Turns the first Ctrl-C, or a request to terminate, into a flag; the second acts as ever.

    Only in the main thread, where alone Python has signals.
    """

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._before: dict[int, Any] = {}
        self._reason: str | None = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    @property
    def reason(self) -> str | None:
        """Why to stop now, or None."""
        if self._reason is None and self.seconds_left <= 0:
            self._reason = "time limit"
        return self._reason

    @property
    def seconds_left(self) -> float:
        """Until the time limit; infinity without one."""
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._reason = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
