"""The interface of a measured training step, and the settings that all systems share."""

from collections.abc import Callable
from typing import NamedTuple

# As in arXiv:2010.09063.
CLIP, NOISE, RATE = 1.0, 1.1, 0.15


class Step(NamedTuple):
    """A training step that is ready to run.

    Attributes:
        run: makes the given number of steps and waits for them.
        parameters: how many are trained.
        start_seconds: how long the first takes beyond a later one; in JAX, tracing and compiling.
        mib: memory at its peak, if the framework tells it.
    """

    run: Callable[[int], None]
    parameters: int
    start_seconds: float
    mib: float | None
