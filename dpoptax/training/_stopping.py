"""Early stop of a run, by a signal or by a time limit, after the steps that are running."""

import contextlib
import contextvars
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Literal, TypeAlias

from dpoptax import _validate

StopRequest: TypeAlias = Literal["SIGINT", "SIGTERM", "time limit"]

SIGNALS: dict[int, StopRequest] = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM"}
# On the clock of `time.monotonic`.
_deadline = contextvars.ContextVar("dpoptax_deadline", default=math.inf)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stops every `fit` inside the block when the time is over.

    `fit` finishes the steps that are running, saves, and returns a result for the steps that ran.
    With `resume`, the next call continues from there.

    Args:
        seconds: from now on. Of nested limits, the earliest one counts.

    Returns:
        A context manager. It acts on `fit` in the same thread.

    Raises:
        TypeError: seconds is not a number.
        ValueError: seconds is negative or not finite.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 20),
        ...     clip=1.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> with time_limit(seconds=0.0):
        ...     result = dpoptax.training.fit(
        ...         lambda mean, x: (mean - x) ** 2, jnp.array(0.0), jnp.ones(200),
        ...         plan=plan, optimizer=optax.sgd(0.1), progress=False,
        ...     )
        >>> result.num_steps, result.stopped
        (0, 'time limit')
    """
    end = time.monotonic() + _validate.non_negative("seconds", seconds)
    token = _deadline.set(min(_deadline.get(), end))
    try:
        yield
    finally:
        _deadline.reset(token)


class Interrupts:
    """Turns the first SIGINT or SIGTERM into a request to stop; a second one acts as usual.

    Python runs signal handlers in the main thread only. In other threads the time limit acts alone.
    """

    def __init__(self) -> None:
        self._deadline = _deadline.get()
        self._handlers: dict[int, Any] = {}
        self._reason: StopRequest | None = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore_handlers()

    @property
    def reason(self) -> StopRequest | None:
        """Why to stop now, or None."""
        if self._reason is None and self.seconds_left <= 0:
            self._reason = "time limit"
        return self._reason

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit; infinity without one."""
        return self._deadline - time.monotonic()

    def _request(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._reason = SIGNALS[number]
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)
